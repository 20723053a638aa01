"""accelerate's hooks and `executors.hf`: what is offloaded is there for the call, or is refused in one line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="the extra moe-ref[qlora]")
pytest.importorskip("accelerate", reason="the extra moe-ref[qlora]")
pytest.importorskip("bitsandbytes", reason="the extra moe-ref[qlora]")

import accelerate

import executors.hf
from executors.hf import quantize_experts
from family_errors import inputs
from packed_models import build, experts_in

pytestmark = pytest.mark.usefixtures("one_thread")
each = pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
Offload = Callable[[Any, Path], object]


def by_map(model: Any, folder: Path) -> None:
    """Every other layer on disk, as ``device_map="auto"`` does where memory is short."""
    places = {name: "cpu" for name, _ in model.named_children() if name != "model"}
    for name, child in model.model.named_children():
        layers = {f"model.{name}.{n}": ("disk" if int(n) % 2 else "cpu") for n, _ in child.named_children()}
        places |= layers if isinstance(child, nn.ModuleList) else {f"model.{name}": "cpu"}
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder)


OFFLOADS: dict[str, Offload] = {
    "cpu_offload": lambda model, folder: accelerate.cpu_offload(model, "cpu"),
    "disk_offload": lambda model, folder: accelerate.disk_offload(model, folder, "cpu"),
    "device_map": by_map,
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(model))[0]


@each
@pytest.mark.parametrize("how", OFFLOADS)
@pytest.mark.parametrize("first", ["use", "offload"])
def test_offloaded_experts_are_there_for_the_call(name: str, how: str, first: str, tmp_path: Path) -> None:
    """AlignDevicesHook is on the experts module, and runs before its forward; nothing of them is kept."""
    model = build(name)
    executors.hf.use(model, "native")
    expected = logits(model)
    offloaded = build(name)
    steps: list[Callable[[], object]] = [
        lambda: executors.hf.use(offloaded, "native"),
        lambda: OFFLOADS[how](offloaded, tmp_path),
    ]
    for step in steps if first == "use" else reversed(steps):
        step()
    away = [module for module in experts_in(offloaded) if next(module.parameters()).is_meta]
    assert away
    for _ in range(2):
        assert torch.equal(logits(offloaded), expected)
        assert all(parameter.is_meta for module in away for parameter in module.parameters())


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # of PEFT
def test_adapters_of_offloaded_experts_stay_on_a_device(tmp_path: Path) -> None:
    """PEFT puts them where the experts are, which is nowhere; there no hook brings them."""
    peft_models = pytest.importorskip("peft_models", reason="the extra moe-ref[qlora]")
    model = peft_models.adapted("mixtral", torch.float32)
    executors.hf.use(model, "native")
    expected = logits(model)
    offloaded = build("mixtral")
    by_map(offloaded, tmp_path)
    ours = peft_models.with_adapter(offloaded)
    executors.hf.use(ours, "native")
    with pytest.raises(
        executors.Unsupported, match=r"^down_proj: its adapter is on the meta device \(offloaded\?\): must"
    ):
        logits(ours)
    for module in ours.modules():
        for factor in ("lora_A", "lora_B"):
            for linear in getattr(module, factor, {}).values():
                if linear.weight.is_meta:
                    linear.to_empty(device="cpu")
    peft_models.fill(ours)
    assert torch.equal(logits(ours), expected)


@each
@pytest.mark.parametrize("how", OFFLOADS)
def test_experts_in_4_bits_cannot_be_offloaded(name: str, how: str, tmp_path: Path) -> None:
    """accelerate hooks what holds the bytes, which nobody calls: one line, and no decoded stack."""
    model = build(name)
    quantize_experts(model)
    executors.hf.use(model)
    OFFLOADS[how](model, tmp_path)
    kind = next(type(module).__name__ for module in build(name).modules() if executors.hf.is_experts(module))
    said = rf"^{kind}: gate_up_proj is on the meta device \(offloaded\?\): must stay on a device, in 4 bits$"
    with pytest.raises(executors.Unsupported, match=said):
        logits(model)


@each
def test_experts_in_4_bits_beside_what_is_offloaded(name: str, tmp_path: Path) -> None:
    """A map that keeps the experts runs."""
    model = build(name)
    quantize_experts(model)
    executors.hf.use(model)
    expected = logits(model)
    for key, module in model.named_modules():
        if key.endswith(("attn", "attention", "lm_head")):
            accelerate.cpu_offload(module, "cpu")
    assert any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(logits(model), expected)


def test_parameters_without_a_hook() -> None:
    (module, *_) = experts_in(build("mixtral"))
    executors.hf.use(module, "native")
    module.down_proj = nn.Parameter(module.down_proj.to("meta"))
    x, ids, scores = torch.randn(5, 32), torch.zeros(5, 2, dtype=torch.int64), torch.rand(5, 2)
    said = r"^MixtralExperts: down_proj is on the meta device \(offloaded\?\): must be brought by a hook"
    with pytest.raises(executors.Unsupported, match=said):
        module(x, ids, scores)
    module.to("meta")
    assert module(x.to("meta"), ids.to("meta"), scores.to("meta")).shape == (5, 32)  # tools that ask for shapes
