"""Experts of transformers models on these executors (extra ``moe-ref[hf]``, transformers 5.2 or later).

    executors.hf.use(model, "auto")  # the experts of a model at hand; says what was switched

or, before a model is made,

    executors.hf.register()
    model = AutoModelForCausalLM.from_pretrained(..., experts_implementation="moe_auto")

Nothing is downloaded. A module's configuration is found from the flags that its class declares, and from what its gate
computes; never from ``hidden_act``. What no `MoEConfig` expresses is refused by name.

`config_of` gives a router's rule: top-k, scoring, renormalisation, groups, selection bias, learned
scales of experts.
"""

from executors.hf.adapters import join_gate_and_up
from executors.hf.export import export_adapter
from executors.hf.injection import peft
from executors.hf.interface import Switched, SwitchedLayer, register, use
from executors.hf.load import load_quantized
from executors.hf.logprobs import chunked_logprobs
from executors.hf.module import config_of_experts, is_experts, weights_of
from executors.hf.quantize import Quantized, QuantizedLayer, quantize_experts
from executors.hf.router import config_of
from executors.hf.router_rules import RouterRule
from executors.hf.save import save_quantized

__all__ = [
    "Quantized",
    "QuantizedLayer",
    "RouterRule",
    "Switched",
    "SwitchedLayer",
    "chunked_logprobs",
    "config_of",
    "config_of_experts",
    "export_adapter",
    "is_experts",
    "join_gate_and_up",
    "load_quantized",
    "peft",
    "quantize_experts",
    "register",
    "save_quantized",
    "use",
    "weights_of",
]
