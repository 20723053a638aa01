"""A norm after each expert in a model of transformers: it is found by its values, and any other is refused."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="the extra moe-ref[hf]")

import executors.hf
import families
from executors.hf.norm import eps_of, factor_of

muse_spark = pytest.importorskip("transformers.models.muse_spark.modeling_muse_spark")
pytestmark = pytest.mark.usefixtures("one_thread")
H = 12
Norm = muse_spark.MuseSparkTextInputScaledRMSNorm


class Changed(Norm):  # type: ignore[misc, valid-type]
    """The norm with another forward pass."""

    def __init__(self, apply: Callable[[Tensor, Tensor, float], Tensor], eps: float = 1e-6) -> None:
        super().__init__(H, eps)
        self.apply_to = apply

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_to(x, 1 + self.weight, self.eps)


def rms(n: Tensor, eps: float) -> Tensor:
    return n * torch.rsqrt(n.square().mean(-1, keepdim=True) + eps)


def with_buffer() -> nn.Module:
    norm = Norm(H)
    norm.register_buffer("scale", torch.ones(H))
    return norm


OTHERS: dict[str, Callable[[], Any]] = {
    "the factor after the norm": lambda: muse_spark.MuseSparkTextCenteredRMSNorm(H),
    "the weight for the factor": lambda: muse_spark.MuseSparkRMSNorm(H),
    "torch's own": lambda: nn.RMSNorm(H, eps=1e-6),
    "without a weight": lambda: muse_spark.MuseSparkRMSNorm(with_scale=False),
    "a mean that is taken off": lambda: nn.LayerNorm(H),
    "a sum for the mean": lambda: Changed(lambda x, g, eps: rms(g * x * H**0.5, eps) / H**0.5),
    "groups of features": lambda: Changed(lambda x, g, eps: rms((g * x).view(-1, 3, 4), eps).flatten(1)),
    "all rows at once": lambda: Changed(lambda x, g, eps: rms((g * x).flatten(), eps).view(x.shape)),
    "the epsilon after the root": lambda: Changed(
        lambda x, g, eps: g * x / ((g * x).square().mean(-1, keepdim=True).sqrt() + eps)
    ),
    "no epsilon": lambda: Norm(H, eps=0.0),
    "rounded to bf16": lambda: Changed(lambda x, g, eps: rms((g * x).bfloat16().float(), eps)),
    "a negative factor made positive": lambda: Changed(lambda x, g, eps: rms(g.abs() * x, eps)),
    "other arguments": lambda: nn.Bilinear(H, H, H, bias=False),
    "a buffer": with_buffer,
    "a weight of two dimensions": lambda: nn.Linear(H, H, bias=False),
    "nothing": lambda: None,
}


@pytest.mark.parametrize("eps", [1e-12, 1e-8, 1e-6, 1.5e-5, 0.125])
@pytest.mark.parametrize("width", [1, H, 300])
def test_the_epsilon_is_found(eps: float, width: int) -> None:
    assert eps_of(Norm(width, eps)) == eps
    assert eps_of(Norm(width, eps).to("meta")) == eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_module_stays_as_it_is(dtype: torch.dtype) -> None:
    norm = Norm(H, 1e-8).to(dtype)
    nn.init.normal_(norm.weight)
    before = norm.weight.detach().clone()
    assert eps_of(norm) == 1e-8
    assert torch.equal(norm.weight, before)
    assert norm.weight.dtype == dtype
    assert norm.weight.grad is None


@pytest.mark.parametrize("what", OTHERS)
def test_any_other_is_refused(what: str) -> None:
    assert eps_of(OTHERS[what]()) is None


def test_the_rule_in_another_class_is_the_rule() -> None:
    assert eps_of(Changed(lambda x, g, eps: rms(g * x, eps))) == 1e-6


def test_the_gradient_reaches_the_weight() -> None:
    norm = Norm(H).bfloat16()
    nn.init.normal_(norm.weight)
    factor = factor_of(norm)
    assert torch.equal(factor, 1 + norm.weight)
    assert factor.dtype == torch.bfloat16
    factor.sum().backward()
    assert norm.weight.grad.tolist() == [1.0] * H


def muse() -> nn.Module:
    return families.build(families.named("muse_spark"))


def experts_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if executors.hf.is_experts(module)]


def test_a_model_is_served_with_its_epsilon_and_its_factor() -> None:
    model = muse()
    switched = executors.hf.use(model, "auto")
    assert {(layer.post_expert_norm, layer.config.post_expert_norm_eps) for layer in switched.layers} == {(True, 1e-8)}
    for module in experts_of(model):
        weights = executors.hf.weights_of(module)
        assert torch.equal(weights.post_expert_norm, 1 + module.post_expert_norm.weight)
    plain = families.build(families.named("mixtral"))
    assert not any(layer.post_expert_norm for layer in executors.hf.use(plain, "auto").layers)


def test_a_model_with_another_norm_is_refused_by_its_class_and_left_alone() -> None:
    model = muse()
    *_, last = experts_of(model)
    last.post_expert_norm = muse_spark.MuseSparkTextCenteredRMSNorm(last.hidden_dim)
    with pytest.raises(executors.Unsupported) as refusal:
        executors.hf.use(model, "native")
    assert str(refusal.value) == (
        "MuseSparkExperts: post_expert_norm is a MuseSparkTextCenteredRMSNorm: must compute "
        "n = (1 + weight) * x, then n / sqrt(mean(n**2) + eps)"
    )
    assert {module.config._experts_implementation for module in experts_of(model)} == {"eager"}


@pytest.fixture
def old() -> Iterator[str]:
    """An executor that knows of no norm, and checks nothing."""

    class Old:
        name, capabilities = "old", executors.Capabilities()

        def experts(self, x: Tensor, **given: Any) -> Tensor:
            raise AssertionError("it was called")

    executors.register("old", Old)
    yield "old"
    executors.unregister("old")


def test_an_executor_that_would_leave_the_norm_out_is_never_called(old: str) -> None:
    model = muse()
    (name,) = executors.hf.register(old)
    with pytest.raises(executors.Unsupported, match=r"^post_expert_norm\.shape=\(24,\): must be None for old$"):
        executors.hf.use(model, old)
    assert {module.config._experts_implementation for module in experts_of(model)} == {"eager"}
    model.set_experts_implementation(name)  # by transformers' own way, which asks nobody
    with pytest.raises(executors.Unsupported, match=r"must be None for old$"):
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64))
