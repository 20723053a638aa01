"""examples/train_tiny.py: the bundled model is the one that was trained, and the command line does what it says."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

import executors
import tiny_training
import train_tiny
from executors import Capabilities
from executors._base.executor import LayerExecutor
from executors.layer_file import bundled_layer
from moe_ref.conformance.mutants import mutants
from tiny import checkpoint
from tiny.model import Model
from tiny.text import sha256, unread_windows

PNG = b"\x89PNG\r\n\x1a\n"
TEXT = "37d06970fc926e60c16dff401e441b84752446a36b6b64516c229fdec77e992c"  # what the bundled model was trained on
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A model that trains in no time in place of the bundled one."""
    monkeypatch.setattr(train_tiny, "bundled_model", tiny_training.model)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def forward_only() -> Iterator[str]:
    """An executor without gradients, for as long as the test runs."""

    class ForwardOnly(LayerExecutor):
        name = "forward_only"
        capabilities = Capabilities(backward=False)

    executors.register("forward_only", ForwardOnly)
    yield "forward_only"
    executors.unregister("forward_only")


def run(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(train_tiny.main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_bundled_model_is_the_one_whose_layer_is_bundled() -> None:
    """Its hidden states before the middle layer are the bundled ones, but for the first layer's 4 bits."""
    if sha256() != TEXT:
        pytest.skip("this Python has another text")
    layer = load_file(bundled_layer())
    seen: list[torch.Tensor] = []

    def watched(x: torch.Tensor, router_logits: torch.Tensor, weights: object) -> torch.Tensor:
        seen.extend([x.flatten(0, 1), router_logits.flatten(0, 1)])
        return executors.get("native")(x, router_logits, weights)

    with torch.no_grad():
        loss = checkpoint.bundled_model().loss(unread_windows(4, 256), watched).item()
    for name, found, tolerance in (("x", seen[2], 0.06), ("router_logits", seen[3], 0.02)):
        bundled = layer[name].double()
        assert (found - bundled).norm() < tolerance * bundled.norm(), name
    assert loss == pytest.approx(1.4327, abs=1e-3)


def test_the_files_are_those_of_the_json() -> None:
    said = json.loads((checkpoint.DATA / "tiny_gpt_oss_layer.json").read_text())["rest_file"]
    assert checkpoint.REST.stat().st_size == said["bytes"]
    assert hashlib.sha256(checkpoint.REST.read_bytes()).hexdigest() == said["sha256"]


def test_the_model_is_that_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    shape = tiny_training.SHAPE
    config = transformers.GptOssConfig(
        vocab_size=shape.vocabulary,
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.layer.top_k,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.head_dim,
        sliding_window=shape.window,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_base},
        swiglu_alpha=shape.layer.alpha,
        swiglu_limit=shape.layer.limit,
        use_cache=False,
    )
    theirs = transformers.GptOssForCausalLM._from_config(config, attn_implementation="eager", dtype=torch.float32)
    ours = Model(shape)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    own = ours.state_dict()
    theirs.load_state_dict({n if n.startswith("lm_head") else f"model.{n}": value for n, value in own.items()})
    tokens = tiny_training.windows()
    with torch.no_grad():
        torch.testing.assert_close(
            ours(tokens, executors.get("native")), theirs(input_ids=tokens).logits, rtol=1e-4, atol=1e-4
        )


@pytest.mark.usefixtures("small")
def test_a_few_steps_from_end_to_end(tmp_path: Path) -> None:
    small = ("--steps", 2, "--windows", 1, "--context", 16, "--honest", 6, "--output", tmp_path)
    result = run("--executor", "native", "--mutant", "one_percent_more", *small)
    assert result.exit_code == 0, result.output
    assert "native: agrees" in result.output
    assert "one_percent_more: wrong on purpose, seen" in result.output
    assert max(map(len, result.output.splitlines())) <= 80
    assert (tmp_path / "train_tiny.png").read_bytes().startswith(PNG)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train_tiny.json", "train_tiny.png"]
    written = json.loads((tmp_path / "train_tiny.json").read_text())
    assert written["text"]["sha256"] == sha256()
    native, wrong = written["contenders"]
    assert (native["agrees"], wrong["agrees"], wrong["wrong_on_purpose"]) == (True, False, True)
    assert len(native["losses"]) == len(written["exact"]) == len(written["deviations"]) == 2
    assert len(written["honest"]) == 6
    assert {"torch", "python", "numpy"} <= written["machine"].keys()


@pytest.mark.usefixtures("small")
def test_a_wrong_executor_ends_with_status_1(tmp_path: Path) -> None:
    executors.register("wrong", lambda: mutants(executors.get("native"))["one_percent_more"])
    try:
        small = ("--steps", 1, "--windows", 1, "--context", 16, "--honest", 6, "--output", tmp_path)
        result = run("--executor", "wrong", *small)
    finally:
        executors.unregister("wrong")
    assert result.exit_code == 1
    assert "wrong: DISAGREES" in result.output


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--executor", "nativ"), "--executor nativ: executor='nativ': must be one of"),
        (("--executor", "grouped_nf4"), "--executor grouped_nf4: gate_up_proj is dense: must be"),
        (("--mutant", "none"), "--mutant none: must be one of"),
        (("--device", "nowhere"), "--device nowhere: must be"),
        (("--windows", 1000), "--windows 1000: 1000 windows of 256 bytes: must be fewer than"),
        (("--output", __file__), f"--output {__file__}: must be a folder"),
    ],
)
def test_bad_input_gets_one_line(arguments: tuple[object, ...], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {said}")
    assert result.stderr.count("\n") == 1


@pytest.mark.usefixtures("small")
def test_an_executor_without_gradients_is_refused(forward_only: str) -> None:
    result = run("--executor", forward_only)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith("error: --executor forward_only: must have gradients")
