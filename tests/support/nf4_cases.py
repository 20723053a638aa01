"""4-bit tensors for the tests of nf4, and comparisons to the last bit."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from executors import nf4
from moe_ref import NF4Tensor
from moe_ref import nf4 as specification

State = dict[str, Tensor]
NAME = "experts.gate_up_proj"
FORMS = [(quant_type, nested) for quant_type in ("nf4", "fp4") for nested in (False, True)]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(found: NF4Tensor, expected: NF4Tensor) -> None:
    """Every array, bit for bit, and everything static."""
    static = ("shape", "dtype", "quant_type", "blocksize", "nested_blocksize", "transposed")
    assert {n: getattr(found, n) for n in static} == {n: getattr(expected, n) for n in static}
    assert found.arrays().keys() == expected.arrays().keys()
    for name, value in found.arrays().items():
        other = expected.arrays()[name]
        assert (value.dtype, value.shape) == (other.dtype, other.shape), name
        assert value.numpy().tobytes() == other.numpy().tobytes(), name


def same_entries(found: State, expected: State) -> None:
    assert list(found) == list(expected)
    for key, value in found.items():
        other = expected[key]
        assert (value.dtype, value.shape) == (other.dtype, other.shape), key
        assert value.numpy().tobytes() == other.numpy().tobytes(), key


def state_of(tensor: NF4Tensor, **changed: Any) -> SimpleNamespace:
    """What bitsandbytes' QuantState is to its readers."""
    state2 = None
    if tensor.nested_absmax is not None:
        blocksize = tensor.nested_blocksize
        own = {"absmax": tensor.nested_absmax, "code": tensor.nested_code, "dtype": torch.float32}
        state2 = SimpleNamespace(blocksize=blocksize, **own)
    code = torch.tensor(specification.CODES[tensor.quant_type])
    fields = {"absmax": tensor.absmax, "shape": torch.Size(tensor.stored_shape), "code": code, "state2": state2}
    fields |= {"blocksize": tensor.blocksize, "quant_type": tensor.quant_type, "dtype": getattr(torch, tensor.dtype)}
    return SimpleNamespace(**fields | {"offset": tensor.nested_offset} | changed)


def small(*shape: int, quant_type: Any = "nf4", nested: bool = False, seed: int = 0) -> NF4Tensor:
    return nf4.quantize_tensor(random(*(shape or (3, 20, 33)), dtype=torch.bfloat16, seed=seed), quant_type, 64, nested)


def decoded(tensor: NF4Tensor) -> bytes:
    return specification.decode(tensor).numpy().tobytes()


def joined(count: int = 3, quant_type: Any = "nf4", nested: bool = True, columns: int = 96) -> NF4Tensor:
    """A stack of experts that were quantised one by one; 60 blocks each, so that no 256 of them are whole."""
    experts = [small(40, columns, quant_type=quant_type, nested=nested, seed=seed) for seed in range(count)]
    return nf4.from_linears([(expert.packed.unsqueeze(1), state_of(expert)) for expert in experts])


def changed_code() -> Tensor:
    code = torch.tensor(specification.NF4_CODE)
    code[3] = code[3].nextafter(torch.tensor(0.0))
    return code


PLAIN, WITH_NESTED = small(), small(nested=True)
TENSORS = {
    "plain": small(),
    "nested": small(nested=True),
    "fp4": small(quant_type="fp4", nested=True),
    "transposed": small(nested=True).transpose(1, 2),
    "one segment of an only expert": replace(small(1, 8, 8, nested=True), nested_offset=torch.ones(1)),
    "empty": small(0, 4, 4, nested=True),
    "one number": nf4.quantize_tensor(torch.tensor(3.0)),
    "float16, blocks of 4096": nf4.quantize_tensor(random(5000), blocksize=4096, dtype="float16"),
}


OLDER = "model.experts.gate_up_projs.{}.weight"


def older(count: int = 12, nested: bool = True, skip: int = -1) -> State:
    entries: State = {"model.experts.gate_up_projs.0.bias": torch.ones(4), "model.experts.router.weight": torch.ones(3)}
    for expert in reversed(range(count)):
        if expert != skip:
            entries |= nf4.to_state_dict(small(4, 32, nested=nested, seed=expert), OLDER.format(expert))
    return entries
