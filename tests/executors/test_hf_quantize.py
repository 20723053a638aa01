"""`executors.hf.quantize_experts`: what is quantised, with which bits, in how much memory, and what is refused."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="the extra moe-ref[qlora]")
pytest.importorskip("bitsandbytes", reason="the extra moe-ref[qlora]")

from bitsandbytes.nn.parametrize import Bnb4bitParametrization
from transformers import LlamaConfig, LlamaForCausalLM

import executors.hf.explain
import executors.nf4
import families
from executors.hf import Quantized, quantize_experts
from executors.nf4 import quantization
from family_errors import run_model
from packed_models import Alive, build, counted, decoded, experts_in, names_of, values_of

pytestmark = pytest.mark.usefixtures("one_thread")
each = pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h", "deepseek_v3"])
FORMS: list[tuple[Any, bool, int]] = [("nf4", True, 64), ("fp4", False, 128)]


@each
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_bits_order_and_keys(name: str, form: tuple[Any, bool, int]) -> None:
    quant_type, nested, blocksize = form
    model, dense = build(name), build(name)
    said = quantize_experts(model, *form)
    for own, other in zip(experts_in(model), experts_in(dense), strict=True):
        for projection in names_of(own):
            expected = executors.nf4.quantize_tensor(getattr(other, projection).detach(), quant_type, blocksize, nested)
            (chain,) = (own.parametrizations[projection],)
            assert isinstance(chain[0], Bnb4bitParametrization)
            found = executors.nf4.from_quant_state(chain.original, chain[0].quant_state)
            assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
            for field, array in expected.arrays().items():
                assert torch.equal(found.arrays()[field], array), field
            keys = {key for key in own.state_dict() if key.startswith(projection) and "bias" not in key}
            assert keys == executors.nf4.to_state_dict(expected, projection).keys()
        assert {key for key in own.state_dict() if "bias" in key} == {k for k in other.state_dict() if "bias" in k}
    assert {
        key for key, value in model.named_parameters() if "experts.parametrizations" in key and value.requires_grad
    } == set()
    assert [(layer.name, layer.parameters) for layer in said.layers] == [
        (key, names_of(module)) for key, module in dense.named_modules() if executors.hf.is_experts(module)
    ]


@each
@pytest.mark.parametrize("first", ["quantize", "use"])
def test_a_model_runs_before_and_after(name: str, first: str) -> None:
    model = build(name)
    steps: list[Callable[[], object]] = [lambda: quantize_experts(model), lambda: executors.hf.use(model, "auto")]
    with counted() as stacks:
        for step in steps if first == "quantize" else reversed(steps):
            step()
        found = run_model(model)
        taken = {row.executor for row in executors.hf.explain.explain_model(model)}
    assert stacks == []
    assert taken == {"grouped_nf4"}
    executors.hf.use(dense := decoded(model, build(name)), "native")
    expected = run_model(dense)
    torch.testing.assert_close(found.output, expected.output, rtol=1e-5, atol=1e-5)
    for key, gradient in found.gradients.items():
        assert (gradient - expected.gradients[key]).norm() <= 1e-5 * expected.gradients[key].norm() + 1e-6, key


def test_what_it_says() -> None:
    said = quantize_experts(build("mixtral").bfloat16())
    assert isinstance(said, Quantized)
    assert re.fullmatch(r"2 layers of MixtralExperts are in nf4: 36\.9 kB became \d+\.?\d* kB", str(said))
    assert all(layer.bytes_before == 18432 for layer in said.layers)
    assert all(0.25 < layer.bytes_after / layer.bytes_before < 0.4 for layer in said.layers)


def test_progress() -> None:
    told: list[tuple[int, int]] = []
    model = build("mixtral")
    total = sum(getattr(module, name).numel() for module in experts_in(model) for name in names_of(module))
    quantize_experts(model, progress=lambda *counts: told.append(counts))
    assert told[0] == (0, total)
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted({done for done, _ in told})


def test_one_projection_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside dense parameters that are still there and 4 bits that are, no more than a projection and its pieces."""
    monkeypatch.setitem(quantization.PIECES, "cpu", 4096)
    (module, *_) = experts_in(build("mixtral"))
    module.gate_up_proj, module.down_proj = nn.Parameter(torch.randn(8, 128, 96)), nn.Parameter(torch.randn(8, 96, 64))
    layers = nn.ModuleList([copy.deepcopy(module) for _ in range(8)])
    del module
    with Alive(layers.parameters()) as alive:
        dense = alive.now()
        said = quantize_experts(layers)
        result = alive.now()
    layer = dense // len(layers)
    assert alive.peak < dense + 0.3 * layer
    held = sum(layer.bytes_after for layer in said.layers)
    tables = 2 * len(said.layers) * 64  # the codes of NF4, which bitsandbytes keeps beside each tensor
    assert result <= held + tables + 4096
    assert result < 0.2 * dense


@pytest.mark.parametrize("odd", [(5, 7), (33, 9), (1, 1)])
def test_blocks_that_straddle_experts_run(odd: tuple[int, int]) -> None:
    """Sizes that no block divides: every executor that takes 4 bits takes them."""
    hidden, intermediate = odd
    (module, *_) = experts_in(build("mixtral"))
    made = torch.Generator().manual_seed(0)
    module.gate_up_proj = nn.Parameter(torch.randn(3, 2 * intermediate, hidden, generator=made))
    module.down_proj = nn.Parameter(torch.randn(3, hidden, intermediate, generator=made))
    dense = copy.deepcopy(module)
    quantize_experts(module)
    dense.gate_up_proj.data, dense.down_proj.data = (values_of(module, name) for name in names_of(module))
    x, ids, scores = torch.randn(9, hidden, generator=made), torch.arange(18).reshape(9, 2) % 3, torch.rand(9, 2)
    executors.hf.use(module, "auto")
    torch.testing.assert_close(module(x, ids, scores), dense(x, ids, scores), rtol=1e-5, atol=1e-5)


def llama() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes))


def broken(change: Callable[[nn.Module], object], name: str = "mixtral") -> nn.Module:
    model = build(name)
    change(experts_in(model)[-1])
    return model


def twice() -> nn.Module:
    model = build("mixtral")
    quantize_experts(model.model.layers[1])
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], type[Exception], str]] = {
    "no experts": (llama, {}, executors.Unsupported, "LlamaForCausalLM: has no experts: must have experts"),
    "twice": (
        twice,
        {},
        executors.Unsupported,
        "model.layers.1.mlp.experts.gate_up_proj is in 4 bits: must be dense: nothing is quantised twice",
    ),
    "type": (lambda: build("mixtral"), {"quant_type": "int4"}, ValueError, "quant_type='int4': must be one of"),
    "blocksize": (lambda: build("mixtral"), {"blocksize": 48}, ValueError, "blocksize=48: must be one of"),
    "fp64": (
        lambda: build("mixtral").double(),
        {},
        TypeError,
        "model.layers.0.mlp.experts.gate_up_proj.dtype=float64: must be one of",
    ),
    "NaN": (
        lambda: broken(lambda module: module.down_proj.data.fill_(torch.nan)),
        {},
        ValueError,
        "model.layers.1.mlp.experts.down_proj has NaN or infinite elements: must be finite",
    ),
    "meta": (
        lambda: broken(lambda module: module.to("meta")),
        {},
        executors.Unsupported,
        "model.layers.1.mlp.experts.gate_up_proj is on the meta device: must have its numbers",
    ),
    "parametrized": (
        lambda: broken(lambda m: nn.utils.parametrize.register_parametrization(m, "down_proj", nn.Identity())),
        {},
        executors.Unsupported,
        "model.layers.1.mlp.experts.down_proj is no parameter of its module: must be one",
    ),
    "module": (lambda: 7, {}, TypeError, "model=7: must be a torch.nn.Module"),  # type: ignore[dict-item, return-value]
    "progress": (lambda: build("mixtral"), {"progress": 3}, TypeError, "progress=3: must be None, True, or a callable"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    """In one line, and nothing is changed."""
    make, given, kind, said = REFUSED[case]
    model = make()
    before = dict(model.named_parameters()) if isinstance(model, nn.Module) else {}
    with pytest.raises(kind, match=re.escape(said)) as caught:
        quantize_experts(model, **given)
    assert "\n" not in str(caught.value)
    for key, value in before.items():
        assert dict(model.named_parameters())[key] is value


def test_loops_of_their_own_are_refused() -> None:
    class FP8Experts(nn.Module):
        pass

    model = nn.ModuleList([families.build(families.named("mixtral")), FP8Experts()])
    with pytest.raises(executors.Unsupported, match="has FP8Experts, with a loop of its own"):
        quantize_experts(model)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("executors.hf.storage.find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match="bitsandbytes is missing: must be there"):
        quantize_experts(build("mixtral"))


@each
def test_state_dicts_are_loaded(name: str) -> None:
    """Strictly, by the keys that they are saved under; the form is that of the entries."""
    model, other = build(name), build(name)
    quantize_experts(model)
    quantize_experts(other, "fp4", False, 128)
    with torch.no_grad():
        for value in other.parameters():
            if value.is_floating_point():
                value.zero_()
    state = model.state_dict()
    executors.hf.use(model, "auto")
    executors.hf.use(other, "auto")
    assert not torch.equal(run_model(other).output, run_model(model).output)
    other.load_state_dict(state)
    assert torch.equal(run_model(other).output, run_model(model).output)
    again = other.state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], value) for key, value in state.items())


def test_state_dicts_of_another_model_are_refused() -> None:
    model = build("mixtral")
    quantize_experts(model)
    state = dict(model.state_dict())
    key = next(key for key in state if key.endswith("gate_up_proj"))
    with pytest.raises(RuntimeError, match=r"Missing key.*gate_up_proj"):
        model.load_state_dict({other: value for other, value in state.items() if not other.startswith(key)})
    with pytest.raises(RuntimeError, match=rf"{re.escape(key)}"):
        model.load_state_dict(state | {f"{key}.absmax": state[f"{key}.absmax"][:-1]})
    smaller = executors.nf4.to_state_dict(executors.nf4.quantize_tensor(torch.ones(2, 4, 32), blocksize=32), key)
    with pytest.raises(RuntimeError, match=r"size mismatch for .*gate_up_proj: shape=\(2, 4, 32\): must be"):
        model.load_state_dict({k: v for k, v in state.items() if not k.startswith(f"{key}.")} | smaller)


def test_a_parameter_that_is_shared_stays_so() -> None:
    model = build("mixtral")
    first, second = experts_in(model)
    second.gate_up_proj = first.gate_up_proj
    quantize_experts(model)
    one, other = (module.parametrizations["gate_up_proj"] for module in (first, second))
    assert one.original.data_ptr() == other.original.data_ptr()
    assert (
        first.parametrizations["down_proj"].original.data_ptr() != second.parametrizations.down_proj.original.data_ptr()
    )


def test_what_was_quantised_in_inference_mode_can_be_trained() -> None:
    model = build("mixtral")
    with torch.inference_mode():
        quantize_experts(model)
    executors.hf.use(model, "auto")
    assert run_model(model.train()).gradients
    assert not any(value.is_inference() for value in model.state_dict().values())
