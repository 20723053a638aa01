"""Models of transformers with PEFT's adapters on their experts, and what watches that nothing forms W + B A."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import layer
from torch import Tensor, nn

import executors.hf
import families
import packed_models
from family_errors import InFloat64

MARKS = [  # of test files: PEFT calls what transformers will give up, and mamba says that it is slow
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*is falling back to its reference"),
]
NAMES = ("gpt_oss", "qwen3_moe", "mixtral", "deepseek_v3", "nemotron_h")
TARGETS = ("experts.gate_up_proj", "experts.up_proj", "experts.down_proj")
VOCAB = 48


def lora_config(**changes: Any) -> LoraConfig:
    """Of all experts and nothing else."""
    given: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": [], "target_parameters": list(TARGETS)}
    return LoraConfig(**given | changes)


def base(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    return families.build(families.named(name)).to(dtype)


def adapted(name: str, dtype: torch.dtype = torch.float64, **changes: Any) -> PeftModel:
    """A family's dense tiny model with random adapters, by PEFT alone."""
    return with_adapter(base(name, dtype), **changes)


def with_adapter(model: nn.Module, **changes: Any) -> PeftModel:
    found = get_peft_model(model, lora_config(**changes), autocast_adapter_dtype=False)
    fill(found)
    return found


def fill(model: nn.Module, seed: int = 0) -> None:
    """Random values for all adapters: PEFT's own B is zero."""
    made = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in sorted(model.named_parameters()):
            if "lora_" in name:
                value.copy_(torch.randn(value.shape, generator=made) * 0.2)


def ids(tokens: int = 7, seed: int = 1) -> Tensor:
    return torch.randint(VOCAB, (2, tokens), generator=torch.Generator().manual_seed(seed))


def widening(model: nn.Module) -> AbstractContextManager[object]:
    return InFloat64() if next(model.parameters()).dtype == torch.float64 else nullcontext()


def logits(model: nn.Module) -> Tensor:
    """In float64 throughout, where the model is."""
    with widening(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers' own loops
        return model(input_ids=ids()).logits


def step(model: nn.Module) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Logits, and the gradient of each trainable parameter, by its name without the nesting of wrappers."""
    model.zero_grad(set_to_none=True)
    found = logits(model)
    upstream = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).reshape(found.shape)
    with widening(model):
        (found * upstream).sum().backward()
    return found.detach(), {name: value.grad for name, value in model.named_parameters() if value.requires_grad}


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-11) -> bool:
    return bool((actual - expected).norm() <= tolerance * expected.norm())


def equal_steps(actual: nn.Module, expected: nn.Module, tolerance: float = 1e-11, adapter: str = "default") -> None:
    """Logits and gradients of two models are the same; ``adapter`` is the first one's name for its "default"."""
    (y, found), (wanted, others) = step(actual), step(expected)
    gradients = {key.replace(f".{adapter}.", ".default."): value for key, value in found.items()}
    assert close(y, wanted, tolerance)
    assert gradients.keys() == others.keys()
    for key, value in others.items():
        mine = gradients[key]
        assert mine is not None, key
        assert value is not None, key
        assert close(mine, value, tolerance), key


def wrappers_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, layer.ParamWrapper)]


def experts_in(model: nn.Module) -> list[nn.Module]:
    return packed_models.experts_in(model)


@contextmanager
def formed(monkeypatch: Any) -> Iterator[list[str]]:
    """What PEFT does meanwhile on the way to W + B A."""
    seen: list[str] = []

    def watch(owner: Any, name: str) -> None:
        true: Callable[..., Any] = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **given: seen.append(name) or true(*args, **given))

    with monkeypatch.context() as patch:
        monkeypatch = patch
        watch(layer.ParamWrapper, "get_delta_weight")
        watch(layer.ParamWrapper, "get_delta_factors")
        watch(nn.utils.parametrize, "register_parametrization")
        yield seen


def largest_allocation(action: Callable[[], object]) -> int:
    """Bytes of the largest block that torch allocates in an action on a CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        action()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    return max(event.nbytes() for event in events if event.name() == "[memory]")


def switched(model: nn.Module, executor: str = "native") -> Any:
    """The model, its adapters apart."""
    executors.hf.use(model, executor)
    return model
