"""Executors of other frameworks: the adapter, and the page's example of one."""

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import executors
from executors import Capabilities, Unsupported
from moe_ref.conformance import profiles
from moe_ref.conformance.adapters import Arrays, ForeignExecutor, ForeignRouter, Layer, layer_of, numpy_of, tensor_of
from moe_ref.conformance.citizen import BEHAVIOURS, check_citizen
from moe_ref.conformance.judgement.call import to_torch
from moe_ref.conformance.judgement.checks import ConformanceError, applicable, check_problem
from moe_ref.conformance.judgement.errors import check_errors, check_undeclared_weights
from moe_ref.conformance.judgement.second_derivatives import check_second_derivatives
from moe_ref.conformance.problems.build import build
from moe_ref.conformance.problems.problem import Problem
from moe_ref.conformance.problems.strategies import problems_for
from moe_ref.routing import route
from moe_ref.types import ExpertLoRA, MoEConfig, MoEWeights

PAGE = Path(__file__).parents[2] / "docs" / "adding-an-executor.md"
SMALL = Problem(3, 4, 8, 4, MoEConfig(2, activation="relu2"), gate_up_bias=True, down_bias=True, entry="experts")


@pytest.fixture(scope="module")
def my_numpy() -> ForeignExecutor:
    (code,) = re.findall(r"\*\*my-numpy/my_numpy.py\*\*\n\n```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {"__name__": "my_numpy"}
    exec(code, names)
    return names["MyNumPy"]()


def test_the_pages_example_passes(my_numpy: ForeignExecutor) -> None:
    """T1, T2, E3, E4, R4, R7, D1, D2: in each dtype, in odd strides, with frozen inputs and empty slots."""
    forms = [
        {},
        {"tokens": 0},
        {"batch": True},
        {"x_layout": "sliced", "weights_layout": "transposed", "dy_layout": "sliced"},
    ]
    forms += [
        {"broken_x": 1},
        {"frozen": frozenset({"x", "down_proj"})},
        {"empty_slots": True, "bias_dtype": "float16"},
    ]
    for dtype in sorted(my_numpy.capabilities.dtypes):
        for form in forms:
            check_problem(my_numpy, applicable(my_numpy, replace(SMALL, dtype=dtype, **form)))
    check_errors(my_numpy)
    check_undeclared_weights(my_numpy)
    check_second_derivatives(my_numpy)


@settings(max_examples=profiles.current().max_examples // 5, deadline=None)
@given(data=st.data())
def test_the_pages_example_on_drawn_problems(my_numpy: ForeignExecutor, data: st.DataObject) -> None:
    check_problem(my_numpy, data.draw(problems_for(my_numpy), label="problem"))


@pytest.mark.parametrize("behaviour", sorted(BEHAVIOURS.keys() - {"copies", "threads"}))
def test_the_pages_example_is_a_good_citizen(my_numpy: ForeignExecutor, behaviour: str) -> None:
    assert check_citizen(my_numpy, behaviour) in ("", "my_numpy has no route")


def test_a_gradient_that_is_wrong_or_missing_is_found(my_numpy: ForeignExecutor) -> None:
    class Wrong(type(my_numpy)):  # type: ignore[misc]
        def backward(self, arrays: Arrays, layer: Layer, dy: Any, wanted: Sequence[str]) -> Arrays:
            found = super().backward(arrays, layer, dy, wanted)
            return found | {"x": 1.001 * found["x"]}

    class Missing(type(my_numpy)):  # type: ignore[misc]
        def backward(self, arrays: Arrays, layer: Layer, dy: Any, wanted: Sequence[str]) -> Arrays:
            found = super().backward(arrays, layer, dy, wanted)
            return {name: value for name, value in found.items() if name != "down_proj"}

    class Flat(type(my_numpy)):  # type: ignore[misc]
        def forward(self, arrays: Arrays, layer: Layer) -> Any:
            return super().forward(arrays, layer).ravel()

    problem = applicable(my_numpy, SMALL)
    with pytest.raises(ConformanceError, match=r"breaks .*D1.*: x\("):
        check_problem(Wrong(), problem)
    with pytest.raises(
        RuntimeError, match=r"^my_numpy.backward gives no gradient of down_proj: must give all of \('x', "
    ):
        check_problem(Missing(), problem)
    with pytest.raises(RuntimeError, match=r"^y is float32 \(24,\): must be of a float dtype, and \(3, 8\)$"):
        check_problem(Flat(), problem)


class Specified(ForeignRouter):
    """Routes by the specification and gives what it was asked for."""

    name = "specified"
    capabilities = Capabilities(dtypes=frozenset({"float32"}))

    def forward(self, arrays: Arrays, layer: Layer) -> Any:
        self.asked = dict(arrays), layer
        return arrays["x"]

    def choose(self, arrays: Arrays, layer: Layer) -> tuple[Any, Any]:
        found = route(arrays["router_logits"], layer.config, arrays.get("selection_bias"))
        return found.topk_ids.astype(np.int32), found.topk_weights


def weights(**changes: Any) -> MoEWeights:
    stacks = torch.ones(4, 6, 5), torch.ones(4, 5, 3)
    lora = ExpertLoRA(down_lora_a=torch.ones(4, 2, 3), down_lora_b=torch.ones(4, 5, 2), down_scaling=0.5)
    return replace(MoEWeights(*stacks, lora=lora, config=MoEConfig(2)), **changes)


def test_what_a_framework_is_given() -> None:
    own, executor = weights(expert_scale=torch.ones(4), selection_bias=torch.ones(4)), Specified()
    x, logits = torch.ones(2, 3, 5), torch.arange(24.0).reshape(2, 3, 4)
    assert executor(x, logits, own).shape == x.shape
    arrays, layer = executor.asked
    assert layer == Layer(own.config, "float32", 1.0, 0.5) == layer_of(own)
    assert (arrays["x"].shape, arrays["router_logits"].shape) == ((6, 5), (6, 4))
    assert arrays.keys() == {"x", "router_logits", "selection_bias", *own.parameters()}
    ids = torch.zeros(2, 3, 2, dtype=torch.int32)
    executor.experts(x, topk_ids=ids, topk_weights=torch.ones(2, 3, 2), weights=own)
    arrays, _ = executor.asked
    assert arrays["topk_ids"].dtype == np.int64
    assert not arrays.keys() & {"selection_bias", "expert_scale", "router_logits"}  # they belong to routing (R9)


def test_route_gives_ids_of_64_bits_in_any_shape() -> None:
    routing = Specified().route(torch.arange(24.0).reshape(2, 3, 4), weights())
    assert routing.topk_ids.dtype == torch.int64
    assert routing.topk_ids.tolist() == [[[3, 2]] * 3] * 2
    assert Specified().route(torch.ones(0, 4), weights()).topk_ids.shape == (0, 2)


REFUSED = {  # what the capabilities lack, a call that wants it, and the line
    "devices": ({"cuda"}, {}, "x.device=cpu: must be cuda for specified"),
    "dtypes": ({"float64"}, {}, "x.dtype=float32: must be float64 for specified"),
    "activations": ({"relu2", "silu"}, {}, "activation=swiglu: must be relu2 or silu for specified"),
    "late_clamp": (False, {"limit": 7.0, "clamp": "after"}, "clamp=after: must be before for specified"),
    "softcap": (False, {"up_softcap": 4.0}, "up_softcap=4.0: must be None for specified"),
    "scale_input": (False, {"scale_input": True}, "scale_input=True: must be False for specified"),
    "lora": (False, {}, "lora=ExpertLoRA: must be None for specified"),
    "routing": (False, {}, "router_logits: must be routed elsewhere; specified has only .experts()"),
    "scorings": ({"sigmoid"}, {}, "scoring=softmax: must be sigmoid for specified"),
    "renormalize_forms": ({"max"}, {}, "renormalize_form=add: must be max for specified"),
    "selection_keys": ({"logit"}, {}, "selection_key=score: must be logit for specified"),
    "selection": (False, {"num_groups": 2, "topk_groups": 2}, "num_groups=2: must be 1 for specified"),
    "expert_scale": (False, {}, "expert_scale.shape=(4,): must be None for specified"),
    "post_expert_norm": (False, {}, "post_expert_norm.shape=(5,): must be None for specified"),
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_is_not_declared_is_refused(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value, config, line = REFUSED[field]
    able = replace(Specified.capabilities, post_expert_norm=field != "post_expert_norm")
    lacking = frozenset(value) if isinstance(value, set) else value
    monkeypatch.setattr(Specified, "capabilities", replace(able, **{field: lacking}))
    own = weights(config=replace(MoEConfig(2), **config), expert_scale=torch.ones(4), post_expert_norm=torch.ones(5))
    with pytest.raises(Unsupported, match=f"^{re.escape(line)}$"):
        Specified()(torch.ones(3, 5), torch.ones(3, 4), own)


def test_a_forked_process_is_refused_if_the_framework_does_not_survive_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Threads(Specified):
        survives_fork = False

    x, logits = torch.ones(3, 5), torch.ones(3, 4)
    Threads()(x, logits, weights())
    Threads()(x, logits, weights())
    monkeypatch.setattr("moe_ref.conformance.adapters.os", SimpleNamespace(getpid=lambda: os.getpid() + 1))
    with pytest.raises(
        RuntimeError, match=r"^specified was called before a fork: must be called in a process that is sp"
    ):
        Threads()(x, logits, weights())
    Specified()(x, logits, weights())


def test_bf16_through_numpy() -> None:
    """As fp32, exactly; or bit by bit, in a dtype of that name."""
    values = torch.tensor([[1.0, -0.0, 3.390625, torch.inf]], dtype=torch.bfloat16)
    assert numpy_of(values).dtype == np.float32
    assert torch.equal(tensor_of(numpy_of(values)).bfloat16(), values)
    ml_dtypes = pytest.importorskip("ml_dtypes")
    bits = numpy_of(values.mT, bfloat16=ml_dtypes.bfloat16)
    assert (bits.dtype.name, bits.shape) == ("bfloat16", (4, 1))
    assert torch.equal(tensor_of(bits).view(torch.int16), values.mT.contiguous().view(torch.int16))
    given = torch.ones(3)
    assert np.shares_memory(numpy_of(given), given.numpy())
    assert not np.shares_memory(tensor_of(numpy_of(given)).numpy(), given.numpy())


def test_it_is_an_executor_of_the_registry() -> None:
    executors.register("specified", Specified)
    try:
        assert executors.get("specified").name == "specified"
        problem = replace(SMALL, config=MoEConfig(2), entry="layer")
        inputs = to_torch(problem, build(problem))
        (row,) = (row for row in executors.explain(inputs.x, inputs.weights) if row.name == "specified")
        assert row.usable
    finally:
        executors.unregister("specified")
