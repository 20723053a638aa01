"""executors.nn.Experts computes what its layer does, learns what it shall, and behaves as every module."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

import executors
from executors.nn import Experts
from moe_ref import MoEWeights
from moe_ref.types import LORA_FACTORS
from nn_cases import KINDS, inputs, layer, slots

every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
@pytest.mark.parametrize("executor", ["auto", "numba"])
def test_a_call_is_the_executors(kind: str, executor: str) -> None:
    module, own = Experts(layer(kind), executor), executors.get(executor)
    x, logits = inputs()
    assert torch.equal(module(x, logits), own(x, logits, layer(kind)))
    assert torch.equal(module(x[None], logits[None]), own(x, logits, layer(kind))[None])
    assert torch.equal(module.experts(x, **slots()), own.experts(x, **slots(), weights=layer(kind)))


def test_a_dense_up_projection_beside_4_bits() -> None:
    weights = replace(layer("dense"), down_proj=layer("nf4").down_proj)
    x, logits = inputs()
    assert torch.equal(Experts(weights)(x, logits), executors.get("auto")(x, logits, weights))


@every_kind
@pytest.mark.parametrize("frozen", [False, True])
def test_what_learns_has_a_gradient(kind: str, frozen: bool) -> None:
    """Adapters always; dense projections, biases and scales unless they are frozen; buffers never."""
    module, weights = Experts(layer(kind), frozen=frozen), layer(kind)
    x, logits = inputs()
    module(x, logits).sum().backward()
    names = dict(module.named_parameters())
    assert names.keys() == weights.parameters().keys()
    leaves = weights.map(lambda value: value.clone().requires_grad_())
    executors.get("auto")(x, logits, leaves).sum().backward()
    for name, parameter in names.items():
        learns = name in LORA_FACTORS or not frozen
        assert parameter.requires_grad == learns
        assert (parameter.grad is None) != learns
        assert not learns or torch.equal(parameter.grad, leaves.parameters()[name].grad), name


def test_tensors_are_shared_if_they_are_contiguous() -> None:
    weights = layer("dense")
    module = Experts(replace(weights, down_proj=weights.down_proj.mT.contiguous().mT))
    assert module.gate_up_proj.data_ptr() == weights.gate_up_proj.data_ptr()
    assert module.down_proj.is_contiguous()
    assert torch.equal(module.down_proj, weights.down_proj)


@every_kind
def test_copies_are_independent_and_compute_the_same(kind: str) -> None:
    module = Experts(layer(kind), "numba", recompute=True, frozen=True)
    x, logits = inputs()
    expected = module(x, logits)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert (other.executor_name, other.options) == ("numba", {"recompute": True})
        assert torch.equal(other(x, logits), expected)
        assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in module.parameters()]
        for array in other.buffers():
            array.zero_()
    assert torch.equal(module(x, logits), expected)


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_r3_q2_casts_change_parameters_and_no_buffer(kind: str, dtype: torch.dtype) -> None:
    """The selection bias, codes and scales keep their bytes; 4 bits decode to the new dtype."""
    module = Experts(layer(kind))
    before = {name: value.clone() for name, value in module.named_buffers()}
    for cast in (lambda: module.to(dtype), lambda: module.float().to(dtype), lambda: module.to("cpu", dtype)):
        cast()
        assert {p.dtype for p in module.parameters()} == {dtype}
        assert {tensor.dtype for tensor in module.weights.packed().values()} <= {str(dtype).removeprefix("torch.")}
        for name, value in module.named_buffers():
            assert value.dtype == before[name].dtype, name
            assert torch.equal(value, before[name]), name
    x, logits = inputs(dtype=dtype)
    assert torch.equal(module(x, logits), executors.get("auto")(x, logits, layer(kind).to(dtype=dtype)))


@pytest.mark.parametrize("kind", ["nf4", "mixed"])
def test_4_bits_are_not_cast_to_what_they_do_not_decode_to(kind: str) -> None:
    module = Experts(layer(kind))
    with pytest.raises(
        TypeError, match=r"^dtype=float64: must be one of float32, bfloat16, float16, since gate_up_proj"
    ):
        module.double()
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert Experts(layer("dense")).double().selection_bias.dtype == torch.float32


@every_kind
def test_everything_moves(kind: str) -> None:
    module = torch.nn.Sequential(Experts(layer(kind))).to("meta")
    assert {value.device.type for value in (*module.parameters(), *module.buffers())} == {"meta"}


def test_a_dense_projection_that_others_cast_takes_4_bits_along() -> None:
    """FSDP2's mixed precision casts parameters for the time of a call."""
    module = Experts(layer("mixed"))
    x, logits = inputs(dtype=torch.bfloat16)
    cast = {name: parameter.detach().bfloat16() for name, parameter in module.named_parameters()}
    y = torch.func.functional_call(module, cast, (x, logits))
    assert torch.equal(y, executors.get("auto")(x, logits, layer("mixed").to(dtype=torch.bfloat16)))


@pytest.mark.parametrize("kind", ["mixed", pytest.param("dense", marks=pytest.mark.nightly)])
def test_compiles_whole_forward_and_backward(kind: str) -> None:
    torch._dynamo.reset()
    module, eager = Experts(layer(kind)), Experts(layer(kind))
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (7, 12):
        x, logits = inputs(tokens)
        y, expected = compiled(x, logits), eager(x, logits)
        assert torch.equal(y, expected)
        y.sum().backward()
        expected.sum().backward()
    for ours, theirs in zip(module.parameters(), eager.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    routed = torch.compile(module.experts, fullgraph=True, backend="eager")
    assert torch.equal(routed(inputs()[0], **slots()), eager.experts(inputs()[0], **slots()))


def test_what_is_no_layer_of_torch_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^weights=3: must be a moe_ref.MoEWeights$"):
        Experts(3)  # type: ignore[arg-type]
    for kind in ("dense", "nf4"):
        weights = layer(kind)
        own = {name: tensor.map(np.asarray) for name, tensor in weights.packed().items()}
        in_numpy: MoEWeights = weights.map(lambda value: value.numpy()).with_parameters(own)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"^weights.gate_up_proj is a numpy.ndarray: must be a torch.Tensor$"):
            Experts(in_numpy)
    with pytest.raises(TypeError, match=r"^frozen=1: must be True or False$"):
        Experts(layer("dense"), frozen=1)  # type: ignore[arg-type]
    with pytest.raises(executors.UnknownExecutor, match=r"^executor='nativ'"):
        Experts(layer("dense"), "nativ")
    with pytest.raises(TypeError, match="paths"):
        Experts(layer("nf4"), "grouped_nf4", paths="torch")
    with pytest.raises(executors.Unsupported, match=r"^gate_up_proj is nf4: must be dense for native"):
        Experts(layer("nf4"), "native")(*inputs())


def test_a_module_says_what_it_is() -> None:
    assert repr(Experts(layer("mixed"), "numba")) == "Experts('numba', E=5, H=32, I=32, gate_up_proj in nf4)"
    assert not hasattr(Experts(layer("dense")), "gate_up_projection")
