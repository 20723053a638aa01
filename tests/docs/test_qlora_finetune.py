"""examples/qlora_finetune.py: its model is the bundled one, its ways agree, and a killed run goes on bit for bit."""

import gc
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from safetensors import safe_open
from typer.testing import CliRunner
from typer.testing import Result as Ended

pytest.importorskip("peft", reason="the extra moe-ref[qlora]")
pytest.importorskip("bitsandbytes", reason="the extra moe-ref[qlora]")

import peft

import executors
import families
import peft_models
import qlora_finetune
from executors import hf
from qlora import models, training
from qlora.contest import Contest, hold, run_of
from qlora.models import RANDOM
from qlora.report import Result, Results
from qlora.setup import Setup, adapted, base_model, windows
from qlora.state import load_state
from qlora.training import Recipe, fine_tune, trained
from tiny import checkpoint
from tiny.text import unread_windows

PNG = b"\x89PNG\r\n\x1a\n"
SCRIPT = Path(qlora_finetune.__file__)
SHAPE = replace(
    models.DEFAULT, layers=2, hidden=64, intermediate=32, experts=4, heads=2, key_value_heads=1, head_dim=32
)
SMALL = Setup(RANDOM, SHAPE, steps=4, windows=2, context=16, rank=2, learning_rate=5e-3)
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),  # PEFT's call
]


@pytest.fixture(autouse=True)
def _deterministic_for_the_test_alone() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


def made(setup: Setup) -> torch.nn.Module:
    model = adapted(base_model(setup), setup)
    hf.use(model, "grouped_nf4")
    return model


def run(*arguments: object) -> Ended:
    app = typer.Typer()
    app.command()(qlora_finetune.main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def small_arguments(folder: Path) -> list[str]:
    sizes = ["--layers", "2", "--hidden", "64", "--intermediate", "64", "--num-experts", "4", "--top-k", "2"]
    return ["--model", "random", *sizes, "--windows", "2", "--context", "16", "--rank", "2", "--output", str(folder)]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gpt_oss", {}),
        ("cohere2_moe", {}),
        ("granitemoe", {"logits_scaling": 0.25}),
        ("gemma4", {"final_logit_softcapping": 0.02}),
    ],
)
def test_the_loss_is_the_model_s_own(name: str, changes: dict[str, float]) -> None:
    """Of models that scale or cap their logits too."""
    model: Any = families.build(families.named(name))
    for field, value in changes.items():
        setattr(model.config.get_text_config(), field, value)
    ids = peft_models.ids()
    with torch.no_grad():
        expected, wrapped = model(input_ids=ids, labels=ids).loss, SimpleNamespace(get_base_model=lambda: model)
        assert abs(training.loss_of(wrapped, ids) - expected) < 1e-5


def test_the_bundled_model_is_that_of_the_other_example() -> None:
    """Transformers' class and the plain one give the same logits for the same parameters."""
    model = models.bundled_model(torch.float32)
    hf.use(model, "native")
    plain = checkpoint.bundled_model().float()
    text = unread_windows(1, 128)[:, :-1]
    with torch.no_grad():
        expected = plain(text, executors.get("native"))
        assert (model(input_ids=text).logits - expected).norm() < 1e-5 * expected.norm()


def test_the_ways_train_alike(tmp_path: Path) -> None:
    """All read the same bytes and the same adapters: in fp32 their losses agree to rounding, and fall."""
    base = models.random_model(SHAPE, 0, torch.float32)
    hf.quantize_experts(base)
    names = ("loop", "stack", "grouped_nf4")
    setup = replace(SMALL, steps=12)
    results = hold(Contest(setup, names, tmp_path, 12, memory=False), adapted(base, setup), lambda name, step: None)
    assert [result.name for result in results] == list(names)
    first = results[0]
    assert first.losses[-1] < first.losses[0] - 0.05
    assert max(result.apart_from(first.losses) for result in results) < 2e-5


def test_a_run_that_stops_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = fine_tune(made(SMALL), windows(SMALL), Recipe(), None, "run")
    file = tmp_path / "state.safetensors"

    def stop(step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    model = made(SMALL)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(model, windows(SMALL), replace(Recipe(), save_every=2), file, "run", stop)
    with safe_open(file, "pt") as state:
        assert len(json.loads(state.metadata()["losses"])) == 2
    other = made(SMALL)
    assert fine_tune(other, windows(SMALL), Recipe(), file, "run").losses == whole.losses


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    model = made(SMALL)
    fine_tune(model, windows(SMALL)[:1], Recipe(), file, "one")
    own = json.loads(run_of(SMALL, "auto"))
    assert (own["python"], own["peft"]) == (platform.python_version(), peft.__version__)
    with pytest.raises(ValueError, match=r"state\.safetensors: is of another run: one; remove it"):
        load_state(file, "other", trained(model), torch.optim.AdamW(trained(model).values()))
    file.write_bytes(b"no state")
    with pytest.raises(ValueError, match=r"state\.safetensors: must be a safetensors file"):
        load_state(file, "one", trained(model), torch.optim.AdamW(trained(model).values()))


@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "non-reentrant"])
def test_parts_of_a_step_add_up(checkpointing: str) -> None:
    """Accumulation and both ways of checkpointing change gradients by rounding at the most."""
    found = []
    for setup, parts in ((SMALL, 1), (replace(SMALL, checkpointing=checkpointing), 2)):
        model = made(setup).float()
        training.gradients(model, windows(setup)[0], parts)
        found.append({name: parameter.grad for name, parameter in trained(model).items()})
    assert all(gradient is not None for gradient in found[1].values())
    for name, gradient in found[0].items():
        assert (gradient - found[1][name]).norm() <= 1e-4 * gradient.norm() + 1e-9, name


def test_the_command_writes_what_it_says(tmp_path: Path) -> None:
    done = run(*small_arguments(tmp_path), "--steps", "2", "--no-memory", "--experts", "loop", "--experts", "auto")
    assert done.exit_code == 0, done.output
    assert "the adapter read back gives the same logits to the last bit" in done.output
    found = json.loads((tmp_path / "qlora_finetune.json").read_text())
    assert [row["name"] for row in found["contenders"]] == ["loop", "auto"]
    assert found["adapter_comes_back"] is True
    assert len(found["exact"]) == 2
    assert found["contenders"][0]["apart_from_exact"] < 0.02
    assert all(row["tokens_per_second"] > 0 and len(row["losses"]) == 2 for row in found["contenders"])
    assert (tmp_path / "qlora_finetune.png").read_bytes().startswith(PNG)
    assert (tmp_path / "adapter/adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("losses", "exact", "agrees"),
    [
        ([2.0, 1.501], [2.0, 1.51], True),
        ([2.0, 1.51], [2.0, 1.509], True),
        ([2.0, 1.51], [2.0, 1.49], False),
        ([2.0, 1.51], None, False),
    ],
    ids=["near the first", "nearer to the exact run", "farther from it", "no exact run"],
)
def test_who_agrees(losses: list[float], exact: list[float] | None, agrees: bool) -> None:
    first, own = (Result(name, found, [1.0], 1, None) for name, found in (("loop", [2.0, 1.5]), ("auto", losses)))
    assert Results([first, own], exact, "byte", True, "", "").ok == agrees
    assert not Results([first, own], exact, "byte", False, "", "").ok


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--experts", "nobody"], "--experts nobody: must be one of loop, stack, "),
        (["--model", "nowhere"], "--model nowhere: must be bundled, random, 20b, or a folder"),
        (["--model", "random", "--top-k", "40"], "--top-k 40: must be at most 32"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--steps", "100000"], "must be at most"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = run(*arguments, "--output", tmp_path / "out")
    assert done.exit_code == 2
    assert len(done.output.strip().splitlines()) == 1
    assert said in done.output


@pytest.mark.nightly
def test_a_killed_process_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """SIGKILL, in the middle of a step: the second process repeats what the first would have done."""
    command = [sys.executable, str(SCRIPT), "--steps", "40", "--no-memory", "--experts", "auto", "--save-every", "1"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen([*command, *small_arguments(killed)])
    state = killed / "state/auto.safetensors"
    while not state.exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with safe_open(state, "pt") as file:
        assert len(json.loads(file.metadata()["losses"])) < 40
    found = []
    for folder in (killed, whole):
        subprocess.run([*command, *small_arguments(folder)], check=True)
        found.append(json.loads((folder / "qlora_finetune.json").read_text())["contenders"][0]["losses"])
    assert found[0] == found[1]


@pytest.mark.parametrize("checkpointing", ["reentrant", "non-reentrant"])
def test_memory_does_not_grow(checkpointing: str) -> None:
    """Live tensors after 50 steps are those after 5, with gradient accumulation."""
    setup = replace(SMALL, steps=50, checkpointing=checkpointing, accumulate=2)
    sizes = []

    def count(step: int) -> None:
        if step in (5, 50):
            gc.collect()
            live = {o.untyped_storage().data_ptr(): o.untyped_storage().nbytes() for o in tensors()}
            sizes.append(sum(live.values()))

    def tensors() -> list[torch.Tensor]:
        """Those with memory: other tests' tracers leave tensors without. (isinstance asks torch's deprecated names.)"""
        plain = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
        return [o for o in plain if o.device.type == "cpu" and o.layout == torch.strided]

    fine_tune(made(setup), windows(setup), Recipe(accumulate=2), None, "run", count)
    assert sizes[0] == sizes[1]
