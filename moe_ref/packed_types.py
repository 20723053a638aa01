"""Projections in 4 bits. Import them from `moe_ref.types`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from moe_ref._typing import Array, Float, UInt8
from moe_ref.moving import DECODED_DTYPES, check_device, moved, named_dtype
from moe_ref.saving import saved

QuantType = Literal["nf4", "fp4"]
Own = TypeVar("Own", bound="PackedTensor")


class PackedTensor:
    """A tensor in 4 bits that replaces a projection. It is frozen: nothing differentiates it.

    A transposed view is a flag, because a shape does not tell the order of the bytes.
    """

    NAMES: ClassVar[tuple[str, ...]]  # of its arrays, the codes first

    if TYPE_CHECKING:  # fields or properties of the subclasses

        @property
        def shape(self) -> tuple[int, ...]:
            """The shape as it is read."""

        @property
        def dtype(self) -> str:
            """The name of the dtype that it decodes to."""

        @property
        def quant_type(self) -> str:
            """The format's name."""

        @property
        def transposed(self) -> bool:
            """Whether the bytes hold the tensor with its last two dimensions swapped."""

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements."""
        return prod(self.shape)

    @property
    def codes(self) -> Array:
        """The bytes that hold two codes each."""
        return getattr(self, self.NAMES[0])

    @property
    def device(self) -> Any:
        """The device of its bytes."""
        return getattr(self.codes, "device", "cpu")

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape as it is stored."""
        return _swapped(self.shape) if self.transposed else tuple(self.shape)

    def transpose(self: Own, first: int, second: int) -> Own:
        """The same bytes, read with the last two dimensions swapped.

        Raises:
            ValueError: for other dimensions.
        """
        if self.ndim < 2 or {first % self.ndim, second % self.ndim} != {self.ndim - 2, self.ndim - 1}:
            raise ValueError(f"dimensions={(first, second)}: must be the last two of {self.ndim}")
        return self._turned()

    def _turned(self: Own) -> Own:
        raise NotImplementedError

    def arrays(self) -> dict[str, Array]:
        """Its arrays by name, without those that are None."""
        return {name: getattr(self, name) for name in self.NAMES if getattr(self, name) is not None}

    def to(self: Own, device: Any = None, *, dtype: Any = None) -> Own:
        """The same bytes on another device, and read as another dtype.

        Neither codes nor scales are ever cast. ``dtype`` is what they decode to: each number is rounded from fp32 to it
        (Q2, M1), not from the dtype before.

        Args:
            device: of the arrays' library; None for where they are.
            dtype: fp32, bf16 or fp16, as a dtype or its name; None for what it is.

        Raises:
            ValueError, TypeError: one line naming the argument, its value, and what is allowed.
        """
        check_device(device)
        named = named_dtype(dtype, DECODED_DTYPES) or self.dtype
        there = self if device is None else self.map(lambda array: moved(array, device))
        return there if named == self.dtype else replace(there, dtype=named)  # type: ignore[type-var]

    def map(self: Own, change: Callable[[Array], Array]) -> Own:
        """The same numbers with every array moved to another device or library; a change that casts is wrong here."""
        return replace(self, **{name: change(array) for name, array in self.arrays().items()})  # type: ignore[type-var]


@saved
@dataclass(frozen=True, eq=False)
class NF4Tensor(PackedTensor):
    """A tensor in 4 bits, in bitsandbytes' format with bitsandbytes' bytes (clauses Q1 to Q5).

    It replaces a projection and is frozen: nothing differentiates it. `moe_ref.nf4` decodes it. B blocks of
    ``blocksize`` codes run over the flattened tensor *as it is stored*. A block may straddle rows and experts; the last
    block may be partial. Source: Dettmers et al. 2023 (arXiv:2305.14314).

    Attributes:
        packed: two codes to a byte, the high nibble first; an odd last code stands alone in the last byte.
        absmax: the scale of each block; with nested statistics, its 8-bit code.
        nested_absmax: the scale of each ``nested_blocksize`` codes in absmax, segment by segment. This and the next two
            are None where absmax is plain.
        nested_code: the number of each 8-bit code (bitsandbytes' ``nested_quant_map``).
        nested_offset: added last. A scalar means one segment; shape (E,) means one segment for each expert (Q5).
        shape: the shape as it is read: (E, J, H) or (E, H, I) for a projection.
        dtype: the name of the dtype that it decodes to, "float32", "bfloat16" or "float16".
        quant_type: "nf4" or "fp4": the table of the 16 codes.
        blocksize: 32, 64, 128, 256, 512, 1024, 2048 or 4096.
        nested_blocksize: 256 in bitsandbytes.
        transposed: whether the bytes hold the tensor with its last two dimensions swapped, as in models that store
            (E, H, 2I). A shape does not tell.
    """

    packed: UInt8[Array, " bytes"] = field(repr=False)
    absmax: Array = field(repr=False)  # Float[B] or UInt8[B]
    nested_absmax: Float[Array, " nested_blocks"] | None = field(default=None, repr=False)
    nested_code: Float[Array, " 256"] | None = field(default=None, repr=False)
    nested_offset: Float[Array, "*segments"] | None = None
    _: KW_ONLY
    shape: tuple[int, ...]
    dtype: str
    quant_type: QuantType = "nf4"
    blocksize: int = 64
    nested_blocksize: int = 256
    transposed: bool = False

    NAMES: ClassVar[tuple[str, ...]] = ("packed", "absmax", "nested_absmax", "nested_code", "nested_offset")

    @property
    def segments(self) -> int:
        """The number of segments of nested statistics, each with its own offset; 1 for plain statistics."""
        return self.nested_offset.shape[0] if self.nested_offset is not None and self.nested_offset.ndim else 1

    def _turned(self) -> NF4Tensor:
        return replace(self, shape=_swapped(self.shape), transposed=not self.transposed)


@saved
@dataclass(frozen=True, eq=False)
class MXFP4Tensor(PackedTensor):
    """A tensor in 4 bits, in the format of gpt-oss' checkpoints with the checkpoint's bytes (clause M1).

    It replaces a projection and is frozen: nothing differentiates it. `moe_ref.mxfp4` decodes it. 32 neighbouring codes
    along the last stored dimension share one scale, a power of two. Sources: OCP Microscaling Formats
    1.0, section 5; gpt-oss, whose ``*_blocks`` and ``*_scales`` these are. (Trap: gpt-oss stores (E, 2I, H) here, with
    the input dimension last, although its parameter in bf16 is (E, H, 2I).)

    Attributes:
        blocks: [..., k / 32, 16] two codes to a byte, the *low* nibble first.
        scales: [..., k / 32] exponents with a bias of 127; 255 is NaN.
        dtype: the name of the dtype that it decodes to, "float32", "bfloat16" or "float16".
        transposed: whether it is read with its last two dimensions swapped.
    """

    blocks: UInt8[Array, "*rows k/32 16"] = field(repr=False)
    scales: UInt8[Array, "*rows k/32"] = field(repr=False)
    _: KW_ONLY
    dtype: str = "bfloat16"
    transposed: bool = False

    NAMES: ClassVar[tuple[str, ...]] = ("blocks", "scales")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape as it is read: (E, J, H) or (E, H, I) for a projection."""
        *rows, groups, size = self.blocks.shape
        stored = (*rows, 2 * groups * size)
        return _swapped(stored) if self.transposed else stored

    @property
    def quant_type(self) -> str:
        """The format's name."""
        return "mxfp4"

    def _turned(self) -> MXFP4Tensor:
        return replace(self, transposed=not self.transposed)


def _swapped(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2])
