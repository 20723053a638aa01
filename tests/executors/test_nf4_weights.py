"""Weights to 4 bits: the bits of clause Q4, in storage order, piece by piece, or a refusal in one line."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import executors
from executors import nf4
from executors.nf4 import quantization
from moe_ref import ExpertLoRA, MoEConfig, MoEWeights
from moe_ref import nf4 as specification
from nf4_cases import random, same

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1,), (3,), (64,), (65,), (2, 3, 5), (3, 64, 64), (2, 1, 8191), (0,), (0, 4, 4), ())


def layer(experts: int = 2, hidden: int = 8, inner: int = 6, dtype: torch.dtype = torch.float32) -> MoEWeights:
    return MoEWeights(
        random(experts, 2 * inner, hidden, dtype=dtype),
        random(experts, hidden, inner, dtype=dtype, seed=1),
        random(experts, 2 * inner, seed=2),
        random(experts, hidden, seed=3),
        random(experts, seed=4),
        ExpertLoRA(random(experts, 3, hidden, seed=5), random(experts, 2 * inner, 3, seed=6)),
        config=MoEConfig(top_k=1),
    )


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(quantization.PIECES, "cpu", 4096)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("small_pieces")
def test_bits_are_the_specifications(dtype: torch.dtype, quant_type: Any, blocksize: int, nested: bool) -> None:
    name = str(dtype).removeprefix("torch.")
    for shape in SHAPES:
        values = random(*shape, dtype=dtype)
        found = nf4.quantize_tensor(values, quant_type, blocksize, nested)
        form: dict[str, Any] = {"quant_type": quant_type, "blocksize": blocksize, "nested": nested}
        same(found, specification.quantize(values, dtype=name, **form))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_ties_and_extremes(quant_type: Any) -> None:
    """Midpoints take the lower code; the numbers next to them, zeros, subnormals and the largest are as specified."""
    numbers = torch.tensor(sorted(set(specification.CODES[quant_type])))
    midpoints = (numbers[1:] + numbers[:-1]) / 2
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    block = torch.cat([midpoints, midpoints.nextafter(up), midpoints.nextafter(down), torch.tensor([1.0, -0.0, 0.0])])
    block = torch.cat([block, torch.zeros(64 - len(block))])
    largest, smallest = torch.finfo(torch.float32).max, 1e-45
    scales = torch.tensor([1.0, -1.0, 2.0**20, 2.0**-126, 1e-38, smallest, 0.0, largest, 3.0])
    values = (scales[:, None] * block).reshape(-1)
    found = nf4.quantize_tensor(values, quant_type)
    same(found, specification.quantize(values, dtype="float32", quant_type=quant_type))
    table = specification.CODES[quant_type]
    lower = [table.index(number) for number in sorted(set(table))[:-1]]
    assert specification.unpack(found.packed, len(lower)).tolist() == lower


def test_an_odd_tail_is_filled_with_the_code_of_zero() -> None:
    for quant_type, zero in (("nf4", 7), ("fp4", 0)):
        found = nf4.quantize_tensor(torch.ones(5), quant_type)
        assert found.packed[-1].item() & 15 == zero


def test_dynamic_code_is_the_specifications() -> None:
    code = nf4.quantize_tensor(random(64), nested=True).nested_code
    assert code.numpy().tobytes() == np.array(specification.dynamic_code(), np.float32).tobytes()


def test_a_layer_keeps_everything_but_its_projections() -> None:
    weights = layer(dtype=torch.bfloat16)
    weights.gate_up_proj.requires_grad_(True)
    found = nf4.quantize(weights, "fp4", 32, True)
    for name in ("gate_up_proj_bias", "down_proj_bias", "selection_bias", "lora", "config"):
        assert getattr(found, name) is getattr(weights, name)
    for name in ("gate_up_proj", "down_proj"):
        form = {"quant_type": "fp4", "blocksize": 32, "nested": True}
        dense = getattr(weights, name).detach()
        same(getattr(found, name), specification.quantize(dense, dtype="bfloat16", **form))
        assert not any(array.requires_grad for array in getattr(found, name).arrays().values())


def test_dtype_is_what_it_decodes_to() -> None:
    for dtype in (torch.float16, "float16"):
        found = nf4.quantize(layer(), dtype=dtype)
        assert [tensor.dtype for tensor in found.packed().values()] == ["float16"] * 2
    values = random(7, 9)
    same(nf4.quantize_tensor(values, dtype="bfloat16"), specification.quantize(values, dtype="bfloat16"))


@pytest.mark.usefixtures("small_pieces")
def test_a_transposed_view_is_quantised_as_it_is_stored() -> None:
    stored = random(3, 40, 70)
    found = nf4.quantize_tensor(stored.transpose(1, 2))
    same(found, specification.quantize(stored, dtype="float32").transpose(1, 2))
    assert found.transposed
    assert found.shape == (3, 70, 40)
    square = random(2, 64, 64)
    assert nf4.quantize_tensor(square.mT).transposed
    assert not nf4.quantize_tensor(square).transposed


VIEWS = {
    "every other row": lambda: random(6, 80, 70)[:, ::2],
    "a part of each row": lambda: random(6, 80, 70)[1:4, :, 3:50],
    "every other number": lambda: random(6, 80, 70)[:, :, ::2],
    "sliced and transposed": lambda: random(6, 80, 70)[:, :, 3:50].transpose(1, 2),
    "experts last": lambda: random(80, 70, 6).permute(2, 0, 1),
    "expanded": lambda: random(1, 80, 70).expand(5, 80, 70),
    "a step in one dimension": lambda: random(20000)[::2],
    "a single column": lambda: random(90, 70)[:, :1],
    "tiny experts": lambda: random(4000, 2, 5)[:, :, :3],
    "one large expert": lambda: random(1, 300, 100)[:, :, :99],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.usefixtures("small_pieces")
def test_any_other_view_is_quantised_in_its_own_order(view: str) -> None:
    values = VIEWS[view]()
    assert not values.is_contiguous()
    same(nf4.quantize_tensor(values), specification.quantize(values.contiguous(), dtype="float32"))


def test_the_weights_are_not_changed() -> None:
    values = random(3, 50)
    before = values.clone()
    nf4.quantize_tensor(values, nested=True)
    assert torch.equal(values, before)


def test_memory_stays_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step sees more than a piece; the blocks of a layer may straddle pieces only at multiples of blocksize."""
    seen = []
    original = quantization.scaled_blocks
    monkeypatch.setitem(quantization.PIECES, "cpu", 4096)
    monkeypatch.setattr(quantization, "scaled_blocks", lambda f, b: (seen.append(f.shape[0]), original(f, b))[1])
    nf4.quantize_tensor(random(3, 1000, 7)[:, :, :5])
    assert seen == [4096, 4096, 4096, 2712]


@pytest.mark.usefixtures("small_pieces")
def test_progress_rises_to_the_total() -> None:
    calls: list[tuple[int, int]] = []
    weights = layer(experts=3, hidden=40, inner=50)
    nf4.quantize(weights, progress=lambda done, total: calls.append((done, total)))
    total = weights.gate_up_proj.numel() + weights.down_proj.numel()
    done = [call[0] for call in calls]
    assert {call[1] for call in calls} == {total}
    assert done == sorted(set(done))
    assert (done[0], done[-1], len(done)) == (0, total, 1 + 3 + 2)
    calls.clear()
    nf4.quantize_tensor(torch.zeros(0), progress=lambda done, total: calls.append((done, total)))
    assert calls == [(0, 0)]


def test_a_bar_goes_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    nf4.quantize(layer(), progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "quantising" in err
    assert "100%" in err


def test_a_bar_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(ModuleNotFoundError, match=r"^progress=True: a bar needs rich: pip install rich, or pass"):
        nf4.quantize(layer(), progress=True)


def broken(name: str, number: float) -> MoEWeights:
    weights = layer()
    getattr(weights, name)[1, 2, 3] = number
    return weights


WEIGHTS = {
    "gate_up_proj has NaN or infinite elements: must be finite": lambda: broken("gate_up_proj", torch.nan),
    "down_proj has NaN or infinite elements: must be finite": lambda: broken("down_proj", -torch.inf),
    "gate_up_proj.dtype=float64: must be one of float32, bfloat16, float16": lambda: layer(dtype=torch.float64),
    "gate_up_proj is an NF4Tensor: must be a dense tensor, since nothing is quantised twice": lambda: nf4.quantize(
        layer()
    ),
    "down_proj is an NF4Tensor: must be a dense tensor, since nothing is quantised twice": lambda: replace(
        layer(), down_proj=nf4.quantize(layer()).down_proj
    ),
    "gate_up_proj is a numpy.ndarray: must be a torch.Tensor": lambda: MoEWeights(
        np.ones((2, 4, 3), np.float32), np.ones((2, 3, 2), np.float32), config=MoEConfig(top_k=1)
    ),
    "weights=7: must be a moe_ref.MoEWeights": lambda: 7,
    "down_proj.shape=(2, 6, 8): must be (2, 8, 6), (E, H, I) to match gate_up_proj (E, 2*I, H)"
    "; stored in the other order? pass down_proj.transpose(1, 2)": lambda: replace(
        layer(), down_proj=layer().down_proj.transpose(1, 2)
    ),
}


@pytest.mark.parametrize("message", WEIGHTS)
def test_weights_that_are_refused(message: str) -> None:
    weights = WEIGHTS[message]()
    with pytest.raises((ValueError, TypeError)) as caught:
        nf4.quantize(weights)
    assert str(caught.value) == message


ARGUMENTS: dict[str, dict[str, Any]] = {
    "quant_type='int4': must be one of 'nf4', 'fp4'": {"quant_type": "int4"},
    "blocksize=48: must be one of 32, 64, 128, 256, 512, 1024, 2048, 4096": {"blocksize": 48},
    "blocksize=64.0: must be an integer": {"blocksize": 64.0},
    "nested=1: must be True or False": {"nested": 1},
    "dtype='float64': must be one of 'float32', 'bfloat16', 'float16'": {"dtype": torch.float64},
    "dtype='half': must be one of 'float32', 'bfloat16', 'float16'": {"dtype": "half"},
    "progress=1: must be None, True, or a callable (done, total)": {"progress": 1},
    "progress=False: must be None, True, or a callable (done, total)": {"progress": False},
}


@pytest.mark.parametrize("message", ARGUMENTS)
def test_arguments_that_are_refused(message: str) -> None:
    for quantise, first in ((nf4.quantize, layer()), (nf4.quantize_tensor, random(4))):
        with pytest.raises((ValueError, TypeError)) as caught:
            quantise(first, **ARGUMENTS[message])
        assert str(caught.value) == message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "values is a builtins.list: must be a torch.Tensor"),
        (torch.ones(3, dtype=torch.int32), "values.dtype=int32: must be one of float32, bfloat16, float16"),
        (torch.tensor([1.0, torch.nan]), "values has NaN or infinite elements: must be finite"),
        (torch.full((5000,), torch.inf, dtype=torch.float16), "values has NaN or infinite elements: must be finite"),
        (nf4.quantize_tensor(random(4)), "values is an NF4Tensor: must be a dense tensor"),
    ],
)
def test_tensors_that_are_refused(values: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        nf4.quantize_tensor(values)
    assert str(caught.value).startswith(message)


def test_it_is_reachable_and_costs_nothing_before() -> None:
    program = (
        "import sys, executors; before = 'torch' in sys.modules; executors.nf4.quantize; executors.mxfp4.quantize; "
        "print(before, 'torch' in sys.modules, sorted(sys.modules.keys() & {'bitsandbytes', 'rich', 'hypothesis'}))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout == "False True []\n"
    with pytest.raises(AttributeError, match="has no attribute 'nf5'"):
        _ = executors.nf5
