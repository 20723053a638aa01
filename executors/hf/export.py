"""The call that writes an adapter of experts for serving engines."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from executors._files.arguments import path_of
from moe_ref.validation.arrays import short

FORMS = ("per_expert",)


def export_adapter(
    model: Any,
    folder: str | os.PathLike[str],
    form: Literal["per_expert"] = "per_expert",
    *,
    adapter: str = "default",
) -> Path:
    """Writes an adapter with an A and a B for each expert's matrix, as serving engines take it.

    The names are those of the model's checkpoint, such as
    ``base_model.model.model.layers.0.mlp.experts.3.gate_proj.lora_A.weight`` [r, H]; where a checkpoint stacks its
    experts, they are gate_proj, up_proj and down_proj of a numbered expert. Gate and up have the same A, and each has
    its rows of B, whatever the layout: nothing is rounded. Adapters of other modules are written beside them.

    Writes ``adapter_model.safetensors`` and ``adapter_config.json``, each whole or not at all. PEFT's own form, which
    PEFT reads back, is what ``model.save_pretrained`` writes.

    Args:
        model: a PeftModel with adapters on its experts, on an executor or not, dense or in 4 bits.
        folder: is made where it is missing; files of these names in it are replaced.
        form: "per_expert".
        adapter: its name in the model.

    Returns:
        The folder.

    Raises:
        TypeError: the model is no PeftModel, the folder is no text and no path, or the adapter's name is no text.
        ValueError: there is no such form or adapter.
        Unsupported: the adapter has what the form cannot say: no experts, biases, whole modules, DoRA, ranks or
            scalings of single modules (``rank_pattern``, ``alpha_pattern``), or a parameter that is no expert's.
        OSError: a file cannot be written.
    """
    if form not in FORMS:
        raise ValueError(f"form={form!r}: must be {FORMS[0]!r}; model.save_pretrained writes PEFT's own form")
    if not hasattr(model, "peft_config") or not hasattr(model, "get_base_model"):
        raise TypeError(f"model is a {type(model).__name__}: must be a PeftModel")
    path_of("folder", folder)
    if not isinstance(adapter, str):
        raise TypeError(f"adapter={short(adapter)}: must be the name of one")
    from executors.hf import adapter_file

    return adapter_file.write(model, folder, adapter)
