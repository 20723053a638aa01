"""`executors.hf` on experts that bitsandbytes parametrizes in 4 bits: bytes read where they lie, no stack decoded."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="the extra moe-ref[qlora]")
pytest.importorskip("bitsandbytes", reason="the extra moe-ref[qlora]")

import executors.hf
import moe_ref
import packed_models
from executors.hf.explain import explain_model
from family_errors import Results, run_model
from packed_models import build, counted, decoded, experts_in, names_of, values_of

pytestmark = pytest.mark.usefixtures("one_thread")
each = pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
each_form = pytest.mark.parametrize("form", packed_models.FORMS)


def packed_parameter(module: nn.Module, name: str) -> tuple[torch.Tensor, object]:
    chain = module.parametrizations[name]
    return chain.original, chain[0].quant_state


@each
@each_form
def test_bytes_are_read_where_they_lie(name: str, form: str) -> None:
    (module, *_) = experts_in(build(name))
    dense = dict(module.named_parameters())
    packed_models.packed_by_bitsandbytes(module, form)
    with counted() as stacks:
        weights = executors.hf.weights_of(module)
    for field, own in zip(("gate_up_proj", "down_proj"), names_of(module), strict=True):
        tensor, (bytes_, state) = getattr(weights, field), packed_parameter(module, own)
        assert isinstance(tensor, moe_ref.NF4Tensor)
        assert tensor.packed.data_ptr() == bytes_.data_ptr()
        assert tensor.absmax.data_ptr() == state.absmax.data_ptr()
        assert tensor.transposed is module.is_transposed
        expected = dense[own].transpose(1, 2) if module.is_transposed else dense[own]
        assert (moe_ref.nf4.decode(tensor) - expected).norm() < 0.2 * expected.norm()
    assert stacks == []


@each
@each_form
@pytest.mark.parametrize("executor", ["auto", "grouped_nf4"])
def test_a_step_decodes_no_stack(name: str, form: str, executor: str) -> None:
    """Asking, switching, explaining, forward and backward; results are those of the decoded model."""
    model = build(name, form)
    expected = run_model(decoded(model, build(name)))
    with counted() as stacks:
        assert all(map(executors.hf.is_experts, model.modules())) is False
        switched = executors.hf.use(model, executor)
        (row, *_) = explain_model(model, executor)
        found = run_model(model)
    assert stacks == []
    assert row.executor == "grouped_nf4"
    assert {layer.kind for layer in switched.layers} == {row.kind}
    assert not row.kind.startswith("Parametrized")
    assert_close(found, expected)


def assert_close(found: Results, expected: Results) -> None:
    torch.testing.assert_close(found.output, expected.output, rtol=1e-4, atol=1e-4)
    dense = {key: value for key, value in expected.gradients.items() if key in found.gradients}
    assert expected.gradients.keys() - dense.keys() == {k for k in expected.gradients if k.endswith(("_proj",))}
    for key, value in dense.items():
        assert (found.gradients[key] - value).norm() <= 1e-4 * value.norm() + 1e-5, key


def test_decoding_is_counted() -> None:
    """transformers' own loop decodes each stack: the counter is no ornament."""
    model = build("mixtral", "nf4")
    with counted() as stacks:
        run_model(model)
    assert len(stacks) >= 4


def test_a_changed_state_is_seen() -> None:
    """Nothing is kept of the bytes or of the statistics."""
    (module, *_) = experts_in(build("mixtral", "nf4"))
    executors.hf.weights_of(module)
    other = copy.deepcopy(module)
    _, state = packed_parameter(other, "down_proj")
    state.absmax = 2 * state.absmax
    assert torch.equal(executors.hf.weights_of(other).down_proj.absmax, state.absmax)
    state.code = state.code.flip(0)
    other.parametrizations["down_proj"][0].quant_state = copy.copy(state)
    with pytest.raises(ValueError, match=r"^quant_state\.code=.* must be the 16 numbers of nf4, bit for bit$"):
        executors.hf.weights_of(other)


def test_statistics_follow_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """module.to(device) moves the bytes alone: their statistics move at the next call, once."""
    (module, *_) = experts_in(build("mixtral", "nf4"))
    _, state = packed_parameter(module, "down_proj")
    elsewhere, state.absmax = state.absmax, state.absmax.to("meta")
    moved: list[str] = []
    monkeypatch.setattr(type(state), "to", lambda own, to: moved.append(str(to)) or setattr(own, "absmax", elsewhere))
    for _ in range(2):
        assert executors.hf.weights_of(module).down_proj.absmax is elsewhere
    assert moved == ["cpu"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_hidden_states_in_another_dtype(dtype: torch.dtype) -> None:
    """Products are in the dtype that the codes decode to, y in that of x."""
    (module, *_) = experts_in(build("gpt_oss").to(dtype))
    packed_models.packed_by_bitsandbytes(module, "nf4")
    executors.hf.use(module)
    other = torch.float32 if dtype is torch.bfloat16 else torch.bfloat16
    x, ids, scores = torch.randn(7, 32), torch.randint(4, (7, 2)), torch.rand(7, 2)
    y, expected = module(x.to(other), ids, scores), module(x.to(other).to(dtype), ids, scores)
    assert y.dtype == other
    assert torch.equal(y, expected.to(other))


def test_one_projection_in_4_bits() -> None:
    """The other is dense: `grouped_nf4` takes both, and `native` says which one it does not take."""
    (module, *_) = experts_in(build("mixtral"))
    packed_models.parametrize.replace_parameter_4bit(module, "down_proj")
    weights = executors.hf.weights_of(module)
    assert isinstance(weights.gate_up_proj, nn.Parameter)
    assert isinstance(weights.down_proj, moe_ref.NF4Tensor)
    inputs = torch.randn(3, 32), torch.randint(4, (3, 2)), torch.rand(3, 2)
    executors.hf.use(module, "grouped_nf4")
    found = module(*inputs)
    (dense, *_) = experts_in(build("mixtral"))
    dense.gate_up_proj.data, dense.down_proj.data = module.gate_up_proj.data, values_of(module, "down_proj")
    executors.hf.use(dense, "native")
    assert (found - dense(*inputs)).norm() < 1e-5 * found.norm()
    low, low_dense = (each.bfloat16()(inputs[0].bfloat16(), *inputs[1:]) for each in (module, dense))
    assert low.dtype == torch.bfloat16
    assert (low - low_dense).norm() < 2e-2 * low_dense.norm()
    executors.hf.use(module, "native")
    with pytest.raises(executors.Unsupported, match="down_proj is nf4"):
        module(*inputs)


def test_another_parametrization_beside_it() -> None:
    (module, *_) = experts_in(build("mixtral", "nf4"))
    nn.utils.parametrize.register_parametrization(module, "down_proj", nn.Identity(), unsafe=True)
    said = "^MixtralExperts: down_proj is in 4 bits and is parametrized by Identity too: must not be$"
    with pytest.raises(executors.Unsupported, match=said):
        executors.hf.weights_of(module)


@each
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of torch, where it traces bitsandbytes' hook
def test_traced_whole(name: str) -> None:
    model = build(name, "nested")
    (module, *_) = experts_in(model)
    executors.hf.use(module)
    x, ids, scores = torch.randn(7, 32), torch.randint(4, (7, 2)), torch.rand(7, 2)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, ids, scores), module(x, ids, scores))
