"""The registry: names, plug-ins, what is told when something is missing or broken, and ``auto``."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import executors
from executors import _registry
from executors import auto as _auto
from executors.native import Native
from moe_ref import MoEConfig, MoEWeights
from moe_ref.conformance.judgement.checks import check_problem
from moe_ref.conformance.problems.problem import Problem

X, LOGITS = torch.ones(3, 4), torch.arange(15.0).view(3, 5)
WEIGHTS = MoEWeights(torch.ones(5, 6, 4), torch.ones(5, 4, 3), config=MoEConfig(2))
NUMPY_X = np.ones((3, 4))
NUMPY_WEIGHTS = MoEWeights(np.ones((5, 6, 4)), np.ones((5, 4, 3)), config=MoEConfig(2))

MADE = Native()

Install = Callable[..., None]


class Picky(Native):
    """Takes no input at all."""

    name = "picky"

    def check(self, x: object, weights: object) -> None:
        raise executors.Unsupported("x.shape: must be to my taste")


@pytest.fixture(autouse=True)
def _empty_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_registry, "_registered", {})
    _registry._plug_ins.cache_clear()
    yield
    _registry._plug_ins.cache_clear()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs a distribution for one test: its entry points {name: target}, and its modules' source."""
    monkeypatch.syspath_prepend(tmp_path)
    written: list[str] = []

    def install(distribution: str, points: dict[str, str], **modules: str) -> None:
        info = tmp_path / f"{distribution}-1.0.dist-info"
        info.mkdir()
        info.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        lines = [f"{name} = {target}" for name, target in points.items()]
        info.joinpath("entry_points.txt").write_text("\n".join(["[moe_ref.executors]", *lines, ""]))
        for module, source in modules.items():
            tmp_path.joinpath(f"{module}.py").write_text(source)
            written.append(module)
        _registry._plug_ins.cache_clear()

    yield install
    for module in written:
        sys.modules.pop(module, None)


def row(name: str, *call: Any) -> executors.Explanation:
    return next(row for row in executors.explain(*call) if row.name == name)


# Names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["native", "grouped_mm", "grouped_nf4", "numba"])
def test_capabilities_are_made_once(name: str) -> None:
    """Every call asks for them, and their words are checked when they are made."""
    assert executors.get(name).capabilities is executors.get(name).capabilities


def test_names_are_sorted_and_hold_the_built_in_ones() -> None:
    assert executors.names() == sorted(executors.names())
    assert set(_registry.BUILT_IN) <= set(executors.names())


@pytest.mark.parametrize("name", sorted(_registry.BUILT_IN))
def test_an_executor_knows_its_own_name(name: str) -> None:
    if name in executors.available():
        assert executors.get(name).name == name


def test_unknown_name_lists_the_names() -> None:
    names = ", ".join(map(repr, executors.names()))
    with pytest.raises(executors.UnknownExecutor) as caught:
        executors.get("quantum")
    hint = "a name that a conftest.py registers exists in its runs of pytest alone"
    assert str(caught.value) == f"executor='quantum': must be one of {names}; {hint}"
    assert isinstance(caught.value, LookupError)


def test_unknown_name_suggests_the_closest() -> None:
    with pytest.raises(executors.UnknownExecutor, match=r"must be one of .*'native'.* \(did you mean 'native'\?\)$"):
        executors.get("nativ")


# Options ---------------------------------------------------------------------------------------------------------


def test_unknown_option_where_there_are_none() -> None:
    with pytest.raises(TypeError) as caught:
        executors.get("auto", recompute=True)
    assert str(caught.value) == "option recompute=True of executor 'auto': there are no options"


def test_unknown_option_lists_the_options() -> None:
    executors.register("tiled", lambda rows=16, *, columns=16: Native())
    assert executors.get("tiled", rows=8, columns=8).name == "native"
    with pytest.raises(TypeError) as caught:
        executors.get("tiled", rows=8, depth=8)
    assert str(caught.value) == "option depth=8 of executor 'tiled': must be one of 'rows', 'columns'"


@pytest.mark.parametrize("kind", [TypeError, ValueError])
@pytest.mark.parametrize("named", [True, False], ids=["named", "any"])
def test_refused_value_of_an_option_is_told_as_it_is(kind: type[Exception], named: bool) -> None:
    def tiled(rows: int) -> Native:
        raise kind(f"rows={rows}: must be even")

    executors.register("tiled", tiled if named else lambda **options: tiled(**options))
    with pytest.raises(kind, match=r"^rows=3: must be even$"):
        executors.get("tiled", rows=3)


# register, unregister --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["executors.native:Native", Native], ids=["text", "factory"])
def test_registered_executor_is_there_until_taken_back(target: Any) -> None:
    executors.register("mine", target)
    assert "mine" in executors.names()
    assert "mine" in executors.available()
    assert isinstance(executors.get("mine"), Native)
    assert row("mine").source == "registered"
    executors.unregister("mine")
    assert "mine" not in executors.names()
    with pytest.raises(executors.UnknownExecutor):
        executors.get("mine")


def test_registering_imports_nothing() -> None:
    executors.register("mine", "no_such_module:Mine")
    assert "mine" in executors.names()
    with pytest.raises(executors.Unavailable, match=r"^executor 'mine' .*no_such_module.* cannot be loaded: "):
        executors.get("mine")


def test_registering_twice_is_refused_and_names_both() -> None:
    executors.register("mine", "first:Mine")
    with pytest.raises(ValueError, match=r"^name='mine': must be new, .*first:Mine.* refused: .*second:Mine"):
        executors.register("mine", "second:Mine")
    assert row("mine").target == "first:Mine"


@pytest.mark.parametrize("name", sorted(_registry.BUILT_IN))
def test_built_in_name_cannot_be_registered(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^name='{name}': must be new, .*built-in"):
        executors.register(name, "mine:Mine")


def test_name_of_a_plug_in_cannot_be_registered(install: Install) -> None:
    install("theirs", {"taken": "theirs:Theirs"})
    with pytest.raises(ValueError, match=r"^name='taken': must be new, .*from distribution theirs, theirs:Theirs"):
        executors.register("taken", "mine:Mine")


@pytest.mark.parametrize("target", ["module", "module:", ":attribute", "a:b:c", ":a:b", ""])
def test_target_must_name_module_and_attribute(target: str) -> None:
    with pytest.raises(ValueError, match=rf"^target='{target}': must be 'module:attribute' or a callable$"):
        executors.register("mine", target)
    assert "mine" not in executors.names()


def test_target_must_be_text_or_callable() -> None:
    with pytest.raises(TypeError, match=r"^target=7: must be 'module:attribute' or a callable$"):
        executors.register("mine", 7)  # type: ignore[arg-type]
    assert "mine" not in executors.names()


def test_an_executor_is_no_factory() -> None:
    """It can be called, but with tensors."""
    told = "is an executor itself, but must be a factory of one, such as its class or lambda: executor$"
    with pytest.raises(TypeError, match=f"^target: a Native {told}"):
        executors.register("mine", Native())  # type: ignore[arg-type]
    assert "mine" not in executors.names()
    executors.register("mine", f"{__name__}:MADE")
    with pytest.raises(executors.Unavailable, match=f"^executor 'mine' .* cannot be made: it {told}"):
        executors.get("mine")


@pytest.mark.parametrize("name", ["mine", "native"])
def test_only_what_was_registered_can_be_taken_back(name: str) -> None:
    with pytest.raises(executors.UnknownExecutor) as caught:
        executors.unregister(name)
    assert str(caught.value) == f"name='{name}': must be one that was registered in this process"
    assert "native" in executors.names()


# available, explain ----------------------------------------------------------------------------------------------


def test_a_row_for_each_name() -> None:
    assert [row.name for row in executors.explain()] == executors.names()
    assert [row.name for row in executors.explain() if row.usable] == executors.available()
    assert row("native") == executors.Explanation(
        "native", True, "", "executors.native:Native", "built-in", weights=("dense",)
    )
    assert row("grouped_nf4").weights == ("fp4", "mxfp4", "nf4")


def test_input_that_an_executor_cannot_take_is_explained() -> None:
    executors.register("picky", Picky)
    assert row("picky").usable
    explained = row("picky", X, WEIGHTS)
    assert (explained.usable, explained.reason) == (False, "x.shape: must be to my taste")
    assert row("native", X, WEIGHTS).usable


def test_remark_on_an_input_that_works_is_explained() -> None:
    class Slow(Native):
        def note(self, x, weights):  # type: ignore[no-untyped-def]
            return "waits for the GPU"

    executors.register("slow", Slow)
    explained = row("slow", X, WEIGHTS)
    assert (explained.usable, explained.reason, explained.note) == (True, "", "waits for the GPU")
    assert row("native", X, WEIGHTS).note == ""


def test_arrays_of_another_library_are_explained() -> None:
    explained = row("native", NUMPY_X, NUMPY_WEIGHTS)
    assert (explained.usable, explained.reason) == (False, "x is a numpy.ndarray: must be a torch.Tensor")
    assert not row("auto", NUMPY_X, NUMPY_WEIGHTS).usable


@pytest.mark.parametrize(("call", "missing"), [((X, None), "weights"), ((None, WEIGHTS), "x")])
def test_input_is_asked_about_as_a_whole(call: tuple[Any, Any], missing: str) -> None:
    with pytest.raises(TypeError, match=f"^{missing}=None: x and weights must be given together$"):
        executors.explain(*call)


def test_executor_that_this_machine_cannot_run_is_explained() -> None:
    def cuda_only() -> Native:
        raise executors.Unavailable("needs a GPU")

    executors.register("cuda_only", cuda_only)
    assert (row("cuda_only").usable, row("cuda_only").reason) == (False, "needs a GPU")
    assert "cuda_only" not in executors.available()
    assert "native" in executors.available()


# A name never stands for another executor ------------------------------------------------------------------------


def test_unsupported_input_does_not_fall_back() -> None:
    executors.register("picky", Picky)
    picky = executors.get("picky")
    with pytest.raises(executors.Unsupported, match="to my taste"):
        picky(X, LOGITS, WEIGHTS)
    with pytest.raises(executors.Unsupported, match="to my taste"):
        picky.experts(X, topk_ids=LOGITS[:, :2].long(), topk_weights=LOGITS[:, :2], weights=WEIGHTS)


def test_unavailable_executor_does_not_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_registry.BUILT_IN, "native", "executors.not_written:Native")
    with pytest.raises(executors.Unavailable, match=r"^executor 'native' .* cannot be loaded: "):
        executors.get("native")


# Plug-ins --------------------------------------------------------------------------------------------------------

LOOP_BACK = """
import executors
from moe_ref.conformance.wrapped import Wrapped

def loop_back():
    return Wrapped("loop_back", executors.get("native"))
"""


def test_loop_back_plug_in_passes_as_native_does(install: Install) -> None:
    install("loop-back", {"loop_back": "loop_back:loop_back"}, loop_back=LOOP_BACK)
    assert "loop_back" in executors.available()
    assert row("loop_back") == executors.Explanation(
        "loop_back", True, "", "loop_back:loop_back", "from distribution loop-back", weights=("dense",)
    )
    executor = executors.get("loop_back")
    assert executor.name == "loop_back"
    problem = Problem(7, 5, 8, 6, MoEConfig(2), gate_up_bias=True, down_bias=True, batch=True)
    verdicts = check_problem(executor, problem)
    assert {"y", "x", "router_logits", "gate_up_proj", "down_proj_bias"} <= {verdict.name for verdict in verdicts}


def test_listing_names_imports_no_plug_in(install: Install) -> None:
    install("lazy", {"lazy": "lazy_plug_in:Lazy"}, lazy_plug_in="class Lazy: pass")
    assert "lazy" in executors.names()
    assert "lazy_plug_in" not in sys.modules


def test_plug_in_of_a_built_in_name_is_refused(install: Install) -> None:
    install("usurper", {"native": "usurper:Usurper", "loyal": "usurper:Usurper"}, usurper="class Usurper: pass")
    with pytest.warns(RuntimeWarning, match=r"^executor 'native' is built in; refused: .*usurper:Usurper"):
        executor = executors.get("native")
    assert type(executor) is Native
    assert row("native").source == "built-in"
    assert "loyal" in executors.available()


@pytest.mark.parametrize("target", ["second:Fast", "first:Fast"], ids=["another target", "the same target"])
def test_two_plug_ins_of_one_name_are_both_named(install: Install, target: str) -> None:
    install("first", {"fast": "first:Fast", "steady": "executors.native:Native"})
    install("second", {"fast": target})
    with pytest.raises(ValueError, match=rf"'fast'.* claimed by .*first, first:Fast.* and .*second, {target}"):
        executors.get("fast")
    assert executors.names().count("fast") == 1
    assert not row("fast").usable
    assert "claimed by" in row("fast").reason
    assert {"native", "steady"} <= set(executors.available())
    assert isinstance(executors.get("steady"), Native)


def test_plug_in_found_twice_is_one(install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install("steady", {"steady": "executors.native:Native"})
    shutil.copytree(tmp_path / "steady-1.0.dist-info", tmp_path / "again" / "steady-1.0.dist-info")
    monkeypatch.syspath_prepend(tmp_path / "again")
    _registry._plug_ins.cache_clear()
    assert isinstance(executors.get("steady"), Native)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise ImportError('libfast.so.2:\\n  no such file')", "ImportError: libfast.so.2: no such file"),
        ("import package_that_nobody_has", "ModuleNotFoundError: No module named 'package_that_nobody_has'"),
        ("def Broken(:", "SyntaxError: "),
        ("raise RuntimeError('driver too old')", "RuntimeError: driver too old"),
        ("raise SystemExit('no licence')", "SystemExit: no licence"),
        ("Fast = None", "AttributeError: module 'broken_plug_in' has no attribute 'Broken'"),
    ],
    ids=["ImportError", "ModuleNotFoundError", "SyntaxError", "RuntimeError", "SystemExit", "AttributeError"],
)
def test_broken_plug_in_spoils_nothing_else(install: Install, source: str, said: str) -> None:
    install("broken", {"broken": "broken_plug_in:Broken"}, broken_plug_in=source)
    assert "broken" in executors.names()
    assert "broken" not in executors.available()
    assert "native" in executors.available()
    with pytest.raises(executors.Unavailable) as caught:
        executors.get("broken")
    message = str(caught.value)
    assert re.match(r"executor 'broken' .*broken_plug_in:Broken.* cannot be loaded: ", message)
    assert said in message
    assert "\n" not in message
    assert row("broken").reason == message


@pytest.mark.parametrize("kind", [RuntimeError, KeyError, AssertionError])
def test_factory_that_breaks_spoils_nothing_else(kind: type[Exception]) -> None:
    def broken() -> Native:
        raise kind("no driver")

    executors.register("broken", broken)
    with pytest.raises(executors.Unavailable, match=r"^executor 'broken' .* cannot be made: .*no driver"):
        executors.get("broken")
    assert "broken" not in executors.available()
    assert "native" in executors.available()


def test_check_that_breaks_spoils_nothing_else() -> None:
    class Broken(Native):
        def check(self, x: object, weights: object) -> None:
            raise AttributeError("no such field")

    executors.register("broken", Broken)
    assert row("broken").usable
    assert (row("broken", X, WEIGHTS).usable, row("native", X, WEIGHTS).usable) == (False, True)
    assert "AttributeError: no such field" in row("broken", X, WEIGHTS).reason


# A missing optional package --------------------------------------------------------------------------------------

WITHOUT_TORCH = """
import sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")

sys.meta_path.insert(0, NoTorch())
import executors

assert "native" in executors.names()
assert executors.available() == []
try:
    executors.get("native")
except executors.Unavailable as error:
    print(error)
assert next(row.reason for row in executors.explain() if row.name == "native") == sys.argv[1]
"""


def test_missing_torch_is_told_with_the_command_that_installs_it() -> None:
    message = """executor 'native' needs torch: pip install "moe-ref[torch]\""""
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_TORCH, message], capture_output=True, text=True, check=False
    )
    assert (ran.stdout, ran.stderr) == (message + "\n", "")


# auto ------------------------------------------------------------------------------------------------------------


def test_auto_says_what_it_chose_and_why() -> None:
    name, why = executors.get("auto").choose(X, WEIGHTS)
    assert name == "native"
    assert why == f"first usable of {', '.join(_auto.PREFERENCE)}"


def test_auto_says_whom_it_passed_over_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    executors.register("picky", Picky)
    executors.register("gone", "no_such_module:Gone")
    monkeypatch.setattr(_auto, "PREFERENCE", ("picky", "gone", "native"))
    name, why = executors.get("auto").choose(X, WEIGHTS)
    assert name == "native"
    assert why.startswith("first usable of picky, gone, native (")
    assert "picky: x.shape: must be to my taste" in why
    assert re.search("executor 'gone' .* cannot be loaded", why)


def test_auto_tells_every_reason_where_nobody_can(monkeypatch: pytest.MonkeyPatch) -> None:
    executors.register("picky", Picky)
    monkeypatch.setattr(_auto, "PREFERENCE", ("picky",))
    auto = executors.get("auto")
    message = r"^no executor can take this input: picky: x\.shape: must be to my taste$"
    for call in (lambda: auto.choose(X, WEIGHTS), lambda: auto.check(X, WEIGHTS), lambda: auto(X, LOGITS, WEIGHTS)):
        with pytest.raises(executors.Unsupported, match=message):
            call()


def test_auto_is_unavailable_where_all_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    executors.register("gone", "no_such_module:Gone")
    monkeypatch.setattr(_auto, "PREFERENCE", ("gone",))
    assert "auto" not in executors.available()
    with pytest.raises(executors.Unavailable, match=r"^executor 'auto' .*executor 'gone' .* cannot be loaded"):
        executors.get("auto")


def test_auto_is_the_executor_that_it_chose() -> None:
    auto, native = executors.get("auto"), executors.get("native")
    routing, expected = auto.route(LOGITS, WEIGHTS), native.route(LOGITS, WEIGHTS)
    assert torch.equal(routing.topk_ids, expected.topk_ids)
    assert torch.equal(routing.topk_weights, expected.topk_weights)
    assert torch.equal(auto(X, LOGITS, WEIGHTS), native(X, LOGITS, WEIGHTS))
    slots = {"topk_ids": routing.topk_ids, "topk_weights": routing.topk_weights, "weights": WEIGHTS}
    assert torch.equal(auto.experts(X, **slots), native.experts(X, **slots))


def test_auto_prefers_built_in_executors_only() -> None:
    assert set(_auto.PREFERENCE) <= set(_registry.BUILT_IN) - {"auto"}


@pytest.mark.parametrize("name", [5, "", None])
def test_name_must_be_text(name: Any) -> None:
    with pytest.raises(TypeError, match=r"must be text, and not empty$"):
        executors.register(name, "a:b")
    assert executors.names()


def test_asking_for_what_is_no_name() -> None:
    with pytest.raises(executors.UnknownExecutor, match=r"^executor=\[\]: must be one of 'auto', "):
        executors.get([])  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "missing"), [("numba", "llvmlite"), ("numba", "numba"), ("triton", "triton")])
def test_what_an_extra_brings_is_told_by_the_extra(name: str, missing: str) -> None:
    """Numba's own module of LLVM may be what is missed first."""
    program = f"import sys; sys.modules[{missing!r}] = None\nimport executors\ntry: executors.get({name!r})\n"
    ran = subprocess.run(
        [sys.executable, "-c", program + "except executors.Unavailable as error: print(error)"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.stdout.endswith(f'pip install "moe-ref[{name}]"\n'), ran.stdout + ran.stderr
