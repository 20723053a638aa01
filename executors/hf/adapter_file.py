"""Writes an adapter of experts with an A and a B for each expert's matrix. (Imports PEFT: `executors.hf.export`.)"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft.tuners.lora import LoraLayer, layer
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from executors._files.tensors import write as write_tensors
from executors._files.whole import cannot_write, locked, sync
from executors._protocol import Unsupported
from executors.hf.adapters import DOWN, factors_of, split_gate_and_up
from executors.hf.checkpoint_names import name_of, names_of_experts
from executors.hf.module import config_of_experts, is_experts
from executors.hf.wrappers import chain_of

ROOT, WRAPPED = "base_model.model.", ".base_layer"
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def write(model: Any, folder: str | os.PathLike[str], adapter: str) -> Path:
    """See `executors.hf.export_adapter`."""
    config, base = _checked_config(model, adapter), model.get_base_model()
    tensors = _others(model, adapter)
    for path, chain in _chains(base):
        for wrapper in chain:
            if adapter in wrapper.lora_A:
                tensors |= _experts(base, path, wrapper, adapter)
    config.target_modules = {key.rsplit(".", 3)[1] for key in tensors}
    config.target_parameters, config.inference_mode = None, True
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        with locked(target), TemporaryDirectory(dir=target, prefix=".export") as temporary:
            config.save_pretrained(temporary)
            write_tensors(Path(temporary, TENSORS), tensors, {"format": "pt"})
            sync(Path(temporary, CONFIG))
            (target / CONFIG).unlink(missing_ok=True)  # no reader takes one adapter's tensors with another's settings
            os.replace(Path(temporary, TENSORS), target / TENSORS)
            os.replace(Path(temporary, CONFIG), target / CONFIG)
    except OSError as error:
        raise cannot_write(target, error) from error
    return target


def _checked_config(model: Any, adapter: str) -> Any:
    """A copy of the adapter's configuration, which says all that the adapter is."""
    if adapter not in model.peft_config:
        raise ValueError(f"adapter={adapter!r}: must be one of {', '.join(map(repr, model.peft_config))}")
    config = copy.deepcopy(model.peft_config[adapter])
    for option, allowed in (("bias", "none"), ("modules_to_save", None), ("use_dora", False), ("lora_bias", False)):
        if (given := getattr(config, option, allowed)) != allowed and given:
            raise Unsupported(
                f"adapter={adapter!r}: {option}={given!r}: must be {allowed!r}: serving engines refuse it"
            )
    own = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or adapter not in module.r:
            continue
        if module.r[adapter] != config.r or abs(module.scaling[adapter] - own) > 1e-9 * abs(own):
            raise Unsupported(
                f"{name}: rank {module.r[adapter]} and scaling {module.scaling[adapter]:g}: must be {config.r} and "
                f"{own:g}, as r and lora_alpha say: serving engines know no others"
            )
    if not any(adapter in wrapper.lora_A for _, chain in _chains(model.get_base_model()) for wrapper in chain):
        raise Unsupported(f"adapter={adapter!r}: must have experts: model.save_pretrained writes it as it is")
    config.rank_pattern, config.alpha_pattern = {}, {}
    return config


def _chains(model: nn.Module) -> list[tuple[str, list[Any]]]:
    """The name of each adapted experts module without its wrappers, and these."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, layer.ParamWrapper) and not name.endswith(WRAPPED):
            chain = chain_of(module)
            if not is_experts(chain[-1].base_layer):
                raise Unsupported(f"{name}.{chain[0].parameter_name} has an adapter: must be a parameter of experts")
            found.append((name, chain))
    return found


def _others(model: Any, adapter: str) -> dict[str, Tensor]:
    """The adapters of ordinary modules, under their checkpoint's names."""
    base, found = model.get_base_model(), {}
    experts = tuple(f"{ROOT}{path}." for path, _ in _chains(base))
    for key, value in get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False).items():
        if not key.startswith(experts):
            path, factor, end = key.removeprefix(ROOT).rsplit(".", 2)
            if f"{factor}.{end}" not in ("lora_A.weight", "lora_B.weight"):
                raise Unsupported(f"adapter={adapter!r} has {key}: must have lora_A.weight and lora_B.weight alone")
            found[f"{ROOT}{name_of(base, path)}.{factor}.{end}"] = _plain(value)
    return found


def _experts(model: nn.Module, path: str, wrapper: Any, adapter: str) -> dict[str, Tensor]:
    """A and B of each expert's matrices: gate and up have the same A, and each its rows of B."""
    module, name = wrapper.get_base_layer(), wrapper.parameter_name
    a, b, _scaling = factors_of(wrapper, adapter)
    config = config_of_experts(module)
    halves = split_gate_and_up(b, config.gate_up_layout) if config.gated and name != DOWN else (b,)
    found: dict[str, Tensor] = {}
    for expert, names in enumerate(names_of_experts(model, path, module, name, wrapper.num_experts)):
        for key, half in zip(names, halves, strict=True):
            found[f"{ROOT}{key}.lora_A.weight"] = _plain(a[expert])
            found[f"{ROOT}{key}.lora_B.weight"] = _plain(half[expert])
    return found


def _plain(value: Tensor) -> Tensor:
    """A copy of its own: safetensors takes no shared memory."""
    return value.detach().cpu().clone().contiguous()
