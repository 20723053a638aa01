"""4-bit tensors of bitsandbytes taken over, joined and unnested: its bytes as they are, or a refusal in one line."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from executors import nf4
from moe_ref import NF4Tensor
from moe_ref import nf4 as specification
from nf4_cases import FORMS, PLAIN, WITH_NESTED, changed_code, decoded, joined, random, same, small, state_of


@pytest.mark.parametrize(("quant_type", "nested"), FORMS)
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_a_quant_state_is_taken_over_without_a_copy(storage: torch.dtype, quant_type: Any, nested: bool) -> None:
    tensor = small(4, 20, 30, quant_type=quant_type, nested=nested)
    packed = nn.Parameter(tensor.packed.view(storage).unsqueeze(1), requires_grad=storage.is_floating_point)
    found = nf4.from_quant_state(packed, state_of(tensor))
    same(found, tensor)
    assert type(found.packed) is Tensor
    assert [found.packed.data_ptr(), found.absmax.data_ptr()] == [packed.data_ptr(), tensor.absmax.data_ptr()]
    assert not found.packed.requires_grad
    read = nf4.from_quant_state(packed, state_of(tensor), transposed=True)
    same(read, tensor.transpose(1, 2))
    assert read.shape == (4, 30, 20)


@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
@pytest.mark.parametrize(("quant_type", "nested"), FORMS)
def test_what_bitsandbytes_quantised_decodes_as_it_says(quant_type: str, nested: bool, storage: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    for shape in ((3, 20, 34), (64, 64), (1, 4096)):
        values = random(*shape, dtype=torch.bfloat16)
        form = {"compress_statistics": nested, "quant_type": quant_type, "quant_storage": getattr(torch, storage)}
        packed, state = functional.quantize_4bit(values, **form)
        found = nf4.from_quant_state(packed, state)
        if shape[0] != 1:  # which the library takes for transposed
            assert torch.equal(specification.decode(found).bfloat16(), functional.dequantize_4bit(packed, state))
        plain = nf4.quantize_tensor(values, quant_type)
        if not nested and quant_type == "nf4" and values.numel() % 64 == 0:  # its FP4 has code 8 for some zeros
            same(found, plain)


def test_a_subclass_becomes_a_plain_tensor() -> None:
    class Labelled(Tensor):
        pass

    tensor = small()
    assert type(nf4.from_quant_state(tensor.packed.as_subclass(Labelled), state_of(tensor)).packed) is Tensor


def without(state: SimpleNamespace, name: str) -> SimpleNamespace:
    delattr(state, name)
    return state


QUANT_STATES: dict[str, tuple[Any, Any]] = {
    "packed has 990 bytes: must be 960, two of the 1920 codes of quant_state.shape=(3, 20, 32) to a byte": (
        PLAIN.packed,
        state_of(PLAIN, shape=torch.Size((3, 20, 32))),
    ),
    "packed has 989 bytes: must be 990": (PLAIN.packed[:-1], state_of(PLAIN)),
    "packed.stride()=(2,): must be contiguous": (PLAIN.packed[::2], state_of(PLAIN)),
    "packed=7: must be a torch.Tensor": (7, state_of(PLAIN)),
    "quant_state=7: must be a bitsandbytes QuantState, but has no absmax": (PLAIN.packed, 7),
    "quant_state.code=[-1.0, ": (PLAIN.packed, state_of(PLAIN, code=changed_code())),
    "quant_state.code=[0.0, ": (PLAIN.packed, state_of(PLAIN, code=torch.tensor(specification.FP4_CODE))),
    "quant_state.code=None: must be a tensor of float32": (PLAIN.packed, state_of(PLAIN, code=None)),
    "quant_state.quant_type='int8': must be one of 'nf4', 'fp4'": (
        PLAIN.packed,
        state_of(PLAIN, quant_type="int8"),
    ),
    "quant_state.quant_type=[]: must be one of": (PLAIN.packed, state_of(PLAIN, quant_type=[])),
    "quant_state.blocksize=48: must be one of 32, ": (PLAIN.packed, state_of(PLAIN, blocksize=48)),
    "quant_state.dtype='float64': must be one of": (PLAIN.packed, state_of(PLAIN, dtype=torch.float64)),
    "quant_state.absmax.dtype=bfloat16: must be one of float32": (
        PLAIN.packed,
        state_of(PLAIN, absmax=PLAIN.absmax.bfloat16()),
    ),
    "quant_state.absmax.shape=(30,): must be (31,), ": (
        PLAIN.packed,
        state_of(PLAIN, absmax=PLAIN.absmax[1:]),
    ),
    "quant_state.packing_format_for_cpu=True: must not be there": (
        PLAIN.packed,
        without(state_of(PLAIN, packing_format_for_cpu=True), "state2"),
    ),
    "quant_state.state2.dtype=bfloat16: must be float32": (
        WITH_NESTED.packed,
        state_of(WITH_NESTED, state2=SimpleNamespace(dtype=torch.bfloat16)),
    ),
    "quant_state.nested_offset=None: must be given": (WITH_NESTED.packed, state_of(WITH_NESTED, offset=None)),
}


@pytest.mark.parametrize("message", QUANT_STATES)
def test_quant_states_that_are_refused(message: str) -> None:
    packed, state = QUANT_STATES[message]
    with pytest.raises((ValueError, TypeError)) as caught:
        nf4.from_quant_state(packed, state)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_transposed_reading_that_is_refused() -> None:
    tensor = small(64)
    with pytest.raises(ValueError, match=r"^transposed=True: must be False for a tensor of shape \(64,\)$"):
        nf4.from_quant_state(tensor.packed, state_of(tensor), transposed=True)
    with pytest.raises(TypeError, match=r"^transposed=1: must be True or False$"):
        nf4.from_quant_state(tensor.packed, state_of(tensor), transposed=1)


# Joining experts


@pytest.mark.parametrize("columns", [96, 64 * 13])  # 60 and 520 blocks each: a part of a nested block, and two and one
@pytest.mark.parametrize(("quant_type", "nested"), FORMS)
def test_joining_is_exact(quant_type: Any, nested: bool, columns: int) -> None:
    experts = [small(40, columns, quant_type=quant_type, nested=nested, seed=seed) for seed in range(3)]
    stack = joined(3, quant_type, nested, columns)
    assert stack.shape == (3, 40, columns)
    assert stack.segments == (3 if nested else 1)
    assert specification.decode(stack).equal(torch.stack([specification.decode(expert) for expert in experts]))
    assert all(
        specification.decode_expert(stack, index).equal(specification.decode(expert))
        for index, expert in enumerate(experts)
    )


def test_an_only_expert_needs_no_whole_blocks() -> None:
    for nested in (False, True):
        expert = small(5, 7, nested=nested)
        stack = nf4.from_linears([(expert.packed, state_of(expert))])
        assert stack.shape == (1, 5, 7)
        assert decoded(stack) == decoded(expert)


def pair(**changed: Any) -> tuple[Tensor, Any]:
    tensor = small(4, 32, nested=changed.pop("nested", False))
    return tensor.packed, state_of(tensor, **changed)


def other_nested_code() -> tuple[Tensor, Any]:
    packed, state = pair(nested=True)
    state.state2.code = state.state2.code.clone()
    state.state2.code[200] += 1
    return packed, state


def of_shape(*shape: int) -> tuple[Tensor, Any]:
    tensor = small(*shape)
    return tensor.packed, state_of(tensor)


LINEARS: dict[str, Callable[[], list[Any]]] = {
    "linears is empty: must have at least one expert": lambda: [],
    "linears[1].shape=(2, 64): must be (4, 32), that of linears[0]": lambda: [pair(), of_shape(2, 64)],
    "linears[2].dtype=float16: must be bfloat16, that of linears[0]": lambda: [
        pair(),
        pair(),
        pair(dtype=torch.float16),
    ],
    "linears[1].quant_type=fp4: must be nf4, that of linears[0]": lambda: [
        pair(),
        pair(quant_type="fp4", code=torch.tensor(specification.FP4_CODE)),
    ],
    "linears[1].blocksize=128: must be 64, that of linears[0]": lambda: [
        pair(),
        pair(blocksize=128, absmax=torch.ones(1)),
    ],
    "linears[1] has plain statistics: must have nested ones, as linears[0] (or unnest)": lambda: [
        pair(nested=True),
        pair(),
    ],
    "linears[1] has nested statistics: must have plain ones, as linears[0] (or unnest)": lambda: [
        pair(),
        pair(nested=True),
    ],
    "linears[1].nested_code differs: must be that of linears[0], bit for bit (or unnest)": lambda: [
        pair(nested=True),
        other_nested_code(),
    ],
    "linears[0].shape=(5, 7) has 35 numbers: must be a multiple of blocksize=64, or else blocks": lambda: [
        of_shape(5, 7),
        of_shape(5, 7),
    ],
    "linears[1]: quant_state.code=[-1.0, ": lambda: [pair(), pair(code=changed_code())],
    "linears[1]: weight.quant_state=None: must be quantised": lambda: [pair(), nn.Linear(4, 4)],
    "linears[0]: 7 has no weight: must be a Linear4bit, or a pair (packed, QuantState)": lambda: [7],
    "linears[1]: quant_state.packing_format_for_cpu=True": lambda: [pair(), pair(packing_format_for_cpu=True)],
}


@pytest.mark.parametrize("message", LINEARS)
def test_experts_that_are_refused(message: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        nf4.from_linears(LINEARS[message]())
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("quant_type", "nested"), FORMS)
def test_linear4bit_modules(quant_type: str, nested: bool) -> None:
    modules = pytest.importorskip("bitsandbytes.nn")
    functional = pytest.importorskip("bitsandbytes.functional")
    linears = nn.ModuleList(
        modules.Linear4bit(64, 12, bias=False, compress_statistics=nested, quant_type=quant_type) for _ in range(3)
    )
    with pytest.raises(ValueError, match=r"^linears\[0\]: weight.quant_state=None: must be quantised"):
        nf4.from_linears(linears)
    linears.to("cpu")
    expected = torch.stack([functional.dequantize_4bit(one.weight, one.weight.quant_state) for one in linears])
    linears[1].weight.quant_state = None  # as FSDP loses it; the module has it still
    assert torch.equal(specification.decode(nf4.from_linears(linears)), expected)


def test_linear4bit_repacked_for_inference_on_a_cpu() -> None:
    """As its forward does where the CPU has bf16 instructions, in evaluation mode; writing a state dict undoes it.

    But not the rounding of absmax: of these numbers nineteen in twenty are others by then.
    """
    modules = pytest.importorskip("bitsandbytes.nn")
    functional = pytest.importorskip("bitsandbytes.functional")
    linear = modules.Linear4bit(256, 32, bias=False, compress_statistics=True, quant_type="nf4").to("cpu")
    weight = linear.weight
    before = specification.decode(nf4.from_linears([linear]))
    weight.data, weight.quant_state = functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    with pytest.raises(ValueError, match=r"^linears\[0\]: quant_state.packing_format_for_cpu=True: must not be there"):
        nf4.from_linears([linear])
    written = nf4.from_state_dict(linear.state_dict(), "weight")
    assert not specification.decode(written).equal(before[0])
    with pytest.raises(ValueError, match=r"^linears\[0\]: quant_state.packing_format_for_cpu=False: must not be there"):
        nf4.from_linears([linear])


@pytest.mark.parametrize(
    "tensor", [small(nested=True), joined(), small(700, 64, nested=True), small(0, 4, nested=True)]
)
def test_unnest_keeps_every_bit(tensor: NF4Tensor) -> None:
    plain = nf4.unnest(tensor)
    assert plain.nested_absmax is plain.nested_code is plain.nested_offset is None
    assert plain.packed is tensor.packed
    assert decoded(plain) == decoded(tensor)
    assert plain.absmax.equal(specification.absmax_of(tensor))
    assert nf4.unnest(plain) is plain


def test_unnest_refuses() -> None:
    with pytest.raises(TypeError, match=r"^tensor=7: must be a moe_ref.NF4Tensor$"):
        nf4.unnest(7)
    with pytest.raises(TypeError, match=r"^tensor.packed is a numpy.ndarray: must be a torch.Tensor$"):
        nf4.unnest(small().map(lambda array: array.numpy()))
