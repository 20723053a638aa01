"""The shapes in the specification's signatures are true: jaxtyping and beartype check every call.

Annotations are read when `moe_ref` is imported, so this file runs itself in a fresh process, with jaxtyping's types in
place of `moe_ref._typing`.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType, ModuleType
from typing import Any, get_args

import beartype
import beartype.roar
import jaxtyping
import numpy as np
import pytest
import torch

MODULES = [
    "activations",
    "combine",
    "experts",
    "grouping",
    "layer",
    "nf4",
    "post_expert_norm",
    "routing",
]
E, K, H, I = 4, 3, 6, 5  # noqa: E741
DERIVED = {"2*I": ("I", lambda size: size / 2), "E+1": ("E", lambda size: size - 1)}


@pytest.mark.parametrize("library", ["numpy", pytest.param("torch", marks=pytest.mark.nightly)])
def test_signatures_are_true(library: str) -> None:
    assert complaints(library) == ""


def test_wrong_shapes_are_refused() -> None:
    assert complaints("wrong") == ""


def complaints(what: str) -> str:
    """The output of a fresh process in which every call is checked."""
    command = [sys.executable, "-W", "error", __file__, what]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    return ran.stdout + ran.stderr


# In the fresh process --------------------------------------------------------------------------------------------


def main(what: str) -> None:
    install_checks()
    if what == "wrong":
        lines = [f"{name} was accepted" for name, call in wrong_calls() if not is_refused(call)]
    else:
        functions = list(functions_with_shapes())
        assert len(functions) > 30
        array = torch.from_numpy if what == "torch" else np.asarray
        called = codes_called(lambda: call_everything(array)) | codes_called(lambda: call_everything_in_4_bits(array))
        lines = [f"{name} was never called" for name, code in functions if code not in called]
    sys.stdout.writelines(f"{line}\n" for line in lines)


def install_checks() -> None:
    typing = ModuleType("moe_ref._typing")
    typing.Array = np.ndarray | torch.Tensor | InFourBits  # type: ignore[attr-defined]
    for dtype in ("Bool", "Float", "Int", "UInt8"):
        setattr(typing, dtype, Annotation(getattr(jaxtyping, dtype)))
    sys.modules["moe_ref._typing"] = typing
    jaxtyping.install_import_hook("moe_ref", "__main__.checked")


def checked(function: Any) -> Any:
    """beartype, except for functions that each call makes anew."""
    return function if "<locals>" in function.__qualname__ else beartype.beartype(function)


class Annotation:
    """jaxtyping's type, with axes such as 2*I solved for I: jaxtyping must otherwise see I itself first."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype

    def __getitem__(self, item: tuple[Any, str]) -> Any:
        array, shape = item
        axes = shape.split()
        plain = self.dtype[array, " ".join("_" if axis in DERIVED else axis for axis in axes)]
        derived = [(i - len(axes), *DERIVED[axis]) for i, axis in enumerate(axes) if axis in DERIVED]
        if not derived:
            return plain
        return Derived(f"{self.dtype.__name__}[{shape}]", (), {"plain": get_args(plain), "derived": derived})


class OfName(type):
    """The type of objects whose class has this name, for classes that cannot be imported before `moe_ref`."""

    def __instancecheck__(cls, value: object) -> bool:
        return type(value).__name__ == cls.__name__


InFourBits = OfName("NF4Tensor", (), {})  # it has a shape and a dtype, and replaces a projection


class Derived(type):
    """The type of arrays with an axis given by an expression."""

    plain: tuple[type, ...]
    derived: list[tuple[int, str, Callable[[int], float]]]

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, cls.plain) and all(
            is_axis(solve(value.shape[position]), name) for position, name, solve in cls.derived
        )


def is_axis(size: float, name: str) -> bool:
    """Whether an axis may have this size, in the call that is being checked."""
    whole = size == int(size) and size >= 0
    return whole and isinstance(np.broadcast_to(0, int(size)), jaxtyping.Shaped[np.ndarray, name])


def call_everything(array: Callable[[np.ndarray], Any]) -> None:
    import moe_ref
    from moe_ref.activations import activation
    from moe_ref.error_bars import error_bars

    rng = np.random.default_rng(0)
    scorings, layouts = ("softmax", "topk_softmax", "sigmoid", "sqrtsoftplus"), ("concatenated", "interleaved")
    for scoring, layout, bias, batch in itertools.product(scorings, layouts, (False, True), ((0,), (5,), (), (2, 3))):
        forms = {"activation": "relu2", "scale_input": True} if bias else {"limit": 1.0, "gate_up_layout": layout}
        groups = {"num_groups": 2, "topk_groups": 2, "group_score": "top2_sum"} if bias else {}
        config = moe_ref.MoEConfig(K, scoring, renormalize=bias, **forms, **groups)
        rows = 2 * I if config.gated else I
        shapes = (*batch, H), (*batch, E), (*batch, H), (E, rows, H), (E, H, I), (E, rows), (E, H), (E,)
        factors = (E, 2, H), (E, rows, 2), (E, 3, I), (E, H, 3)
        x, logits, dy, gate_up, down, *biases = (array(rng.standard_normal(shape)) for shape in shapes)
        lora = moe_ref.ExpertLoRA(*(array(rng.standard_normal(shape)) for shape in factors), 2.0, 0.5)
        weights = moe_ref.MoEWeights(gate_up, down, *((*biases, lora) if bias else ()), config=config)
        for form in ({"activation": "geglu"}, {"gate_softcap": 4.0, "up_softcap": 25.0}):
            activation(array(rng.standard_normal((2, 2 * I))), moe_ref.MoEConfig(K, **form))
        routing = moe_ref.route(logits.reshape(-1, E), config, weights.selection_bias)
        slots = routing.topk_ids.reshape(*batch, K), routing.topk_weights.reshape(*batch, K)
        if bias:
            learned = {"expert_scale": array(rng.standard_normal(E)), "post_expert_norm": array(rng.standard_normal(H))}
            weights = dataclasses.replace(weights, **learned)
        moe_ref.moe(x, logits, weights)
        moe_ref.moe_vjp(x, logits, weights, dy)
        moe_ref.routed_experts(x, *slots, weights)
        moe_ref.routed_experts_vjp(x, *slots, weights, dy)
        if batch == (5,):
            weighed = {"router_logits": logits} if bias else {"topk_weights": slots[1]}
            error_bars(x, routing.topk_ids, weights, dy, **weighed, dtype="float32", samples=2)


def call_everything_in_4_bits(array: Callable[[np.ndarray], Any]) -> None:
    from moe_ref import MoEConfig, MoEWeights
    from moe_ref.nf4 import absmax_of, decode, decode_expert, quantize

    values = array(np.random.default_rng(0).standard_normal((E, H, I)).astype(np.float32))
    for nested, quant_type in itertools.product((False, True), ("nf4", "fp4")):
        tensor = quantize(values, dtype="bfloat16", quant_type=quant_type, blocksize=32, nested=nested)
        absmax_of(tensor)
        decode(tensor)
        decode_expert(tensor.transpose(1, 2), E - 1)
        MoEWeights(tensor, tensor.transpose(1, 2), config=MoEConfig(K))


def codes_called(function: Callable[[], None]) -> set[CodeType]:
    called = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            called.add(frame.f_code)

    sys.setprofile(note)
    function()
    sys.setprofile(None)
    return called


def functions_with_shapes() -> Iterator[tuple[str, CodeType]]:
    for module in (importlib.import_module(f"moe_ref.{name}") for name in MODULES):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            original = inspect.unwrap(function)
            if original.__module__ == module.__name__ and "[Array, " in str(original.__annotations__):
                yield f"{module.__name__}.{name}", original.__code__


def wrong_calls() -> list[tuple[str, Callable[[], Any]]]:
    from moe_ref import ExpertLoRA, MoEConfig, MoEWeights, Routing
    from moe_ref import activations as e
    from moe_ref import grouping as g
    from moe_ref import nf4 as q
    from moe_ref import routing as r
    from moe_ref.combine import combine, combine_vjp
    from moe_ref.experts import Linear
    from moe_ref.post_expert_norm import normalize, normalize_vjp
    from moe_ref.types import Grouping, NF4Tensor

    config, a, ids = MoEConfig(K), np.zeros, np.zeros((2, K), dtype=int)
    order, sizes = np.arange(2 * K), np.zeros(E, dtype=int)
    normed = MoEWeights(a((E, 2 * I, H)), a((E, H, I)), config=config, post_expert_norm=a(H))
    return [
        ("combine: topk_weights without K", lambda: combine(a((2 * K, H)), a(2))),
        ("combine: topk_weights of integers", lambda: combine(a((2 * K, H)), ids)),
        ("combine_vjp: dy of other tokens", lambda: combine_vjp(a((2, K)), a((3, H)))),
        ("permute: order of floats", lambda: g.permute(a((2, H)), a(2 * K), K)),
        ("unpermute: inverse of fewer slots", lambda: g.unpermute(a((2 * K, H)), order[1:])),
        ("activation: an odd last axis", lambda: e.activation(a((2, 7)), config)),
        ("activation_vjp: dh of other rows", lambda: e.activation_vjp(a((2, 2 * I)), config, a((3, I)))),
        ("join_gate_up: halves differ", lambda: e.join_gate_up(a((2, I)), a((2, I + 1)), config)),
        ("unpack: bytes of another type", lambda: q.unpack(np.zeros(3, dtype=np.int8), 6)),
        ("unpack: a column of bytes", lambda: q.unpack(np.zeros((3, 1), dtype=np.uint8), 6)),
        ("pack: codes of floats", lambda: q.pack(a(4), 0)),
        ("NF4Tensor: packed of floats", lambda: NF4Tensor(a(4), a(1), shape=(8,), dtype="float32")),
        ("Linear: bias of another length", lambda: Linear(a((I, H)), a(H))),
        ("Linear: factors of two ranks", lambda: Linear(a((I, H)), None, a((2, H)), a((I, 3)))),
        ("ExpertLoRA: factors of two ranks", lambda: ExpertLoRA(a((E, 2, H)), a((E, I, 3)))),
        ("choose: bias of other experts", lambda: r.choose(a((2, E)), config, a((E, 1)))),
        ("softmax: without tokens", lambda: r.softmax(a(E))),
        ("take_chosen: ids of other tokens", lambda: r.take_chosen(a((3, E)), ids)),
        ("Routing: another K", lambda: Routing(ids, a((2, K + 1)))),
        ("Grouping: E offsets", lambda: Grouping(order, order, sizes, sizes)),
        ("normalize: outputs of integers", lambda: normalize(ids, normed)),
        ("normalize_vjp: gradients of other rows", lambda: normalize_vjp(a((2, H)), normed, a((3, H)))),
        ("MoEWeights: another H", lambda: MoEWeights(a((E, 2 * I, H)), a((E, H + 1, I)), config=config)),
        ("MoEWeights: bias of another J", lambda: MoEWeights(a((E, 2 * I, H)), a((E, H, I)), a((E, I)), config=config)),
    ]


def is_refused(call: Callable[[], Any]) -> bool:
    try:
        call()
    except (jaxtyping.TypeCheckError, beartype.roar.BeartypeCallHintViolation):
        return True
    return False


if __name__ == "__main__":
    main(sys.argv[1])
