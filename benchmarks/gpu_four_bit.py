"""The benchmark in 4 bits, a process after the other: python benchmarks/gpu_four_bit.py DEVICE FOLDER SECONDS [--short]

Decoding, forward, against our bf16 kernels on decoded weights; and fine-tuning with adapters against the loops over
experts, with peak memory; each in NF4, in MXFP4, and in NF4 with nested statistics. Each has an equal share of the
seconds that are left, and a folder of its own in FOLDER. Standard library only.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

FORMATS = {"nf4": ("nf4",), "mxfp4": ("mxfp4",), "nested": ("nf4", "--nested")}
DECODING = {"layers": ("gpt-oss-20b", "qwen3-30b-a3b"), "tokens": (1, 2, 4, 8, 16), "direction": "forward"}
TRAINING = {"layers": ("gpt-oss-20b",), "tokens": (4096, 8192), "direction": "lora"}
TINY = ("--scale", "256", "--seconds", "0", "--rounds", "1", "--interpreted", "--no-memory")
SHORT = (("mxfp4", "training"),)
LEAST_S = 1.0


def runs(short: bool) -> dict[str, list[str]]:
    """What is asked of ``python -m executors bench``, by the names of the folders."""
    found = {}
    for form, weights in FORMATS.items():
        for what, asked in (("decoding", DECODING), ("training", TRAINING)):
            if short and (form, what) not in SHORT:
                continue
            layers, tokens = (("mixtral-8x7b",), (3,)) if short else (asked["layers"], asked["tokens"])
            chosen = [part for layer in layers for part in ("--layer", layer)]
            chosen += [part for count in tokens for part in ("--tokens", str(count))]
            options = ["--weights", *weights, *chosen, "--direction", str(asked["direction"])]
            found[f"{form}-{what}"] = [*options, *(TINY if short else ())]
    return found


def main(device: str, folder: str, seconds: str, *options: str) -> int:
    """Exit status 1 if one failed, or was left out for want of time."""
    started, failed = time.monotonic(), []
    asked = runs("--short" in options)
    for number, (name, arguments) in enumerate(asked.items()):
        left = float(seconds) - (time.monotonic() - started)
        if left < LEAST_S:
            print(f"{name}: left out, the limit of {seconds} s had passed", flush=True)
            failed.append(name)
            continue
        print(f"--- {name}", flush=True)
        limit = ["--limit", f"{left / (len(asked) - number):.0f}", "--out", str(Path(folder) / name)]
        command = [sys.executable, "-m", "executors", "bench", *arguments, "--device", device, *limit]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    print(f"{len(asked) - len(failed)} of {len(asked)} runs done; failed or left out: {', '.join(failed) or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
