"""Draws four-bit-bytes.png, the byte order of the 4-bit formats: python docs/images/four_bit_bytes.py"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#666666"


def box(ax: Axes, x: float, y: float, width: float, text: str, colour: str, filled: bool = False) -> None:
    """A rectangle with a text in it."""
    ax.add_patch(
        plt.Rectangle(
            (x, y), width, 1, facecolor=colour if filled else "white", edgecolor=colour, alpha=0.9, linewidth=1
        )
    )
    ax.text(x + width / 2, y + 0.5, text, ha="center", va="center", fontsize=9, color="white" if filled else "black")


def pairs(ax: Axes, y: float, first: tuple[str, str], colour: str) -> None:
    """Three bytes with their nibbles, and the places in the matrix that those hold."""
    for byte in range(3):
        x = 4 * byte
        ax.text(x + 1.9, y + 1.25, f"byte {byte}", ha="center", fontsize=8, color=GREY)
        for nibble, name in enumerate(("bits 7-4", "bits 3-0")):
            place = 2 * byte + (nibble if first[0] == "high" else 1 - nibble)
            box(ax, x + 1.9 * nibble, y, 1.9, f"w[{place}]", colour, filled=place % 2 == 0)
            ax.text(x + 1.9 * nibble + 0.95, y - 0.4, name, ha="center", fontsize=7, color=GREY)
    ax.text(12.4, y + 0.5, "...", va="center", fontsize=12, color=GREY)
    ax.text(13.6, y + 0.5, first[1], va="center", fontsize=9)


def blocks(ax: Axes, y: float, rows: list[list[tuple[float, str]]], colour: str, note: str) -> None:
    """Rows of a matrix, each cut into what has one scale."""
    for number, row in enumerate(rows):
        x = 0.0
        for place, (width, text) in enumerate(row):
            box(ax, x, y - 1.15 * number, width, text, colour, filled=(place + number) % 2 == 1)
            x += width
        ax.text(-0.3, y - 1.15 * number + 0.5, f"row {number}", ha="right", va="center", fontsize=8, color=GREY)
    ax.text(13.6, y - 0.1, note, va="center", fontsize=9)


def main() -> None:
    """One panel for bitsandbytes' formats, one for MXFP4."""
    figure, axes = plt.subplots(2, 1, figsize=(10, 6), constrained_layout=True)
    axes[0].set_title("NF4 and FP4 (bitsandbytes): NF4Tensor.packed, absmax", loc="left", fontsize=11)
    pairs(axes[0], 3.2, ("high", "the high nibble first;\nodd rows begin within a byte"), BLUE)
    straddling = [
        [(7.0, "absmax[0]: 64 weights"), (5.0, "absmax[1]")],
        [(2.0, "absmax[1]"), (7.0, "absmax[2]"), (3.0, "[3]")],
    ]
    blocks(axes[0], 1.0, straddling, BLUE, "blocks run on over rows\nand experts, as stored")
    axes[1].set_title("MXFP4 (gpt-oss): MXFP4Tensor.blocks, scales", loc="left", fontsize=11)
    pairs(axes[1], 3.2, ("low", "the low nibble first"), ORANGE)
    own = [[(4.0, f"scales[{row},{group}]: 32") for group in range(3)] for row in range(2)]
    blocks(axes[1], 1.0, own, ORANGE, "each row has blocks of its\nown; a scale is 2^(e - 127)")
    for ax in axes:
        ax.set_xlim(-1.6, 19)
        ax.set_ylim(-0.5, 5.0)
        ax.axis("off")
    figure.savefig(Path(__file__).with_name("four-bit-bytes.png"), dpi=120)


if __name__ == "__main__":
    main()
