"""torch.save and torch.load(weights_only=True), pickle and copy of what `moe_ref.types` has; hostile files of it."""

import copy
import io
import pickle
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch

import executors
import moe_ref
from executors import mxfp4, nf4
from moe_ref import ExpertLoRA, MoEConfig, MoEWeights
from moe_ref.saving import KINDS, rebuild
from moe_ref.types import Grouping, MoEGradients, Routing

E, H, INTERMEDIATE, RANK = 2, 32, 32, 2


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


LORA = ExpertLoRA(
    random(E, RANK, H), random(E, 2 * INTERMEDIATE, RANK), random(E, RANK, INTERMEDIATE), random(E, H, RANK), 0.5
)
PLAIN = MoEWeights(
    random(E, 2 * INTERMEDIATE, H), random(E, H, INTERMEDIATE), config=MoEConfig(1, limit=7.0, renormalize=True)
)
DENSE = replace(
    PLAIN,
    gate_up_proj_bias=random(E, 2 * INTERMEDIATE),
    down_proj_bias=random(E, H),
    selection_bias=random(E),
    expert_scale=random(E),
    post_expert_norm=random(H),
    lora=LORA,
)
NESTED = nf4.quantize(replace(PLAIN, lora=LORA), nested=True)
OBJECTS: dict[str, Any] = {
    "dense": DENSE,
    "nested": NESTED,
    "fp4, transposed": nf4.quantize_tensor(random(E, H, INTERMEDIATE).mT, "fp4", 32),
    "segments": replace(
        NESTED.gate_up_proj,
        nested_absmax=NESTED.gate_up_proj.nested_absmax.repeat(E),
        nested_offset=torch.zeros(E),
    ),
    "mxfp4": mxfp4.quantize(PLAIN),
    "config": MoEConfig(2, scoring="sigmoid", num_groups=2),
    "routing": Routing(torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1)),
    "grouping": Grouping(*(torch.arange(3) for _ in range(4))),
    "gradients": MoEGradients(random(3, H), None, random(3, 1)),
}


def by_torch(value: Any) -> Any:
    file = io.BytesIO()
    torch.save({"value": value}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)["value"]


WAYS: dict[str, Callable[[Any], Any]] = {
    "torch": by_torch,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


def same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if is_dataclass(one):
        for field in fields(one):
            same(getattr(one, field.name), getattr(other, field.name))
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert one.stride() == other.stride()
        assert torch.equal(one, other)
    else:
        assert one == other


def test_every_kind_is_tried() -> None:
    tried = {type(value).__name__ for value in OBJECTS.values()} | {"ExpertLoRA", "NF4Tensor", "MXFP4Tensor"}
    assert tried == KINDS.keys() == {name for name in vars(moe_ref.types) if is_dataclass(vars(moe_ref.types)[name])}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OBJECTS)
def test_nothing_is_lost(way: str, name: str) -> None:
    same(WAYS[way](OBJECTS[name]), OBJECTS[name])


def test_what_was_loaded_computes_the_same_bits() -> None:
    x, logits = random(3, H), random(3, E)
    for name, weights in (("native", replace(DENSE, post_expert_norm=None)), ("grouped_nf4", NESTED)):
        call = executors.get(name)
        assert torch.equal(call(x, logits, by_torch(weights)), call(x, logits, weights))


def test_a_copy_shares_and_a_deep_copy_does_not() -> None:
    assert copy.copy(DENSE).down_proj is DENSE.down_proj
    deep = copy.deepcopy(replace(DENSE, down_proj=DENSE.gate_up_proj))
    assert deep.down_proj is deep.gate_up_proj is not DENSE.gate_up_proj


class Derived(MoEWeights):
    """Somebody's own class, with what it adds."""


def test_a_derived_class_keeps_its_class() -> None:
    own = Derived(PLAIN.gate_up_proj, PLAIN.down_proj, config=PLAIN.config)
    object.__setattr__(own, "extra", 7)
    for found in (copy.copy(own), copy.deepcopy(own)):
        assert type(found) is Derived
        assert vars(found)["extra"] == 7


def test_a_new_process_loads_it_whatever_is_imported_first(tmp_path: Any) -> None:
    """Neither `executors` nor what looks for torch imports it; both orders of imports are right."""
    path = str(tmp_path / "weights.pt")
    torch.save(NESTED, path)
    program = (
        "import importlib.util, sys, executors\n"
        "assert importlib.util.find_spec('torch') and 'torch' not in sys.modules\n"
        "import torch\n"
        f"print(torch.load({path!r}, weights_only=True).config.limit)\n"
        "assert not [finder for finder in sys.meta_path if type(finder).__module__ == 'executors._after_import']\n"
    )
    ran = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert (ran.stdout, ran.stderr) == ("7.0\n", "")


class Calls:
    """An object whose pickle calls a function, as a hostile file may."""

    def __init__(self, function: Any, *given: Any) -> None:
        self.call = function, given

    def __reduce__(self) -> Any:
        return self.call


FIELDS = {field.name: getattr(PLAIN, field.name) for field in fields(PLAIN)}
HOSTILE: dict[str, tuple[Calls, str]] = {
    "another class": (Calls(rebuild, "Path", {}), "saved object is a 'Path': must be one of ExpertLoRA, "),
    "no name": (Calls(rebuild, [1], {}), r"saved object is a \[1\]: must be one of "),
    "no field": (Calls(rebuild, "MoEConfig", {}), "saved MoEConfig has no top_k: must have it"),
    "a method": (
        Calls(rebuild, "MoEWeights", {**FIELDS, "packed": OrderedDict}),
        "saved MoEWeights has 'packed': must",
    ),
    "no dict": (Calls(rebuild, "MoEConfig", [1]), "saved MoEConfig has list: must have a dict of fields"),
    "no names": (Calls(rebuild, "MoEConfig", {1: 2}), "saved MoEConfig has dict: must have a dict of fields by name"),
    "the class itself": (Calls(MoEWeights, 1, 2), "Unsupported global: GLOBAL moe_ref.types.MoEWeights"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_no_file_makes_half_an_object(what: str) -> None:
    value, said = HOSTILE[what]
    with pytest.raises((ValueError, pickle.UnpicklingError), match=said):
        by_torch(value)


def test_a_field_that_is_new_has_its_default() -> None:
    """So files of earlier versions are read."""
    older = {name: value for name, value in FIELDS.items() if name != "expert_scale"}
    same(by_torch(Calls(rebuild, "MoEWeights", older)), PLAIN)


JUNK: tuple[Any, ...] = (
    *(None, True, -1, 10**30, float("nan"), "x", (), [1, 2], {1: 2}, OrderedDict()),
    *(torch.zeros(0), torch.zeros(E, 3, 4), torch.zeros(E, 2 * INTERMEDIATE, H, dtype=torch.uint8)),
    *(torch.zeros(E, 2 * INTERMEDIATE, H).to_sparse(), torch.zeros(E, 2 * INTERMEDIATE, H, device="meta")),
    *(MoEConfig(1), PLAIN, NESTED.gate_up_proj, LORA),
)


def spoiled(value: Any) -> Iterator[tuple[str, Any]]:
    """The object with one field, at any depth, that holds something else."""
    for field in fields(value):
        own = getattr(value, field.name)
        for junk in JUNK:
            yield f"{field.name}={junk!r:.40}", replace(value, **{field.name: junk})
        if is_dataclass(own):
            for name, inner in spoiled(own):
                yield f"{field.name}.{name}", replace(value, **{field.name: inner})


@pytest.mark.parametrize(("name", "weights"), [("native", DENSE), ("grouped_nf4", NESTED)])
def test_what_a_file_put_into_a_field_is_refused_at_the_first_call(name: str, weights: MoEWeights) -> None:
    """`rebuild` does not look into fields: every call does."""
    x, logits, call, unclear = random(3, H), random(3, E), executors.get(name), []
    for what, odd in spoiled(weights):
        try:
            call(x, logits, odd)
        except (ValueError, TypeError, executors.Unsupported) as error:
            if "\n" in str(error) or "must " not in str(error):
                unclear.append((what, str(error)))
    assert unclear == []
