"""``explain --model``: what becomes of a model's MoE layers."""

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from typer.testing import CliRunner

from executors._cli.app import app
from executors.hf.explain import explain_model, meta_model


def explain(*arguments: str) -> tuple[int, str]:
    """The exit status, and what was printed, in one line."""
    result = CliRunner().invoke(app, ["explain", *arguments])
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


def config(folder: Path, **changes: object) -> str:
    sizes = {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 32, "num_local_experts": 4}
    text = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]} | sizes | changes
    (folder / "config.json").write_text(json.dumps(text))
    return str(folder)


def test_a_folder_without_weights_is_enough(tmp_path: Path) -> None:
    status, said = explain("--model", config(tmp_path))
    assert status == 0
    for part in ("model.layers.[0-2].mlp.experts", "native", "E=4 H=64 I=32 swiglu"):
        assert part in said


def test_a_class_has_its_default_sizes() -> None:
    (row,) = explain_model(meta_model("GptOssForCausalLM"))
    assert (len(row.layers), row.kind, row.sizes) == (36, "GptOssExperts", "E=128 H=2880 I=2880")
    assert (row.config, row.executor) == ("swiglu alpha=1.702 limit=7 up_offset=1 interleaved", "native")


def test_the_executor_asked_for_answers() -> None:
    (row,) = explain_model(meta_model("GptOssForCausalLM"), "grouped_nf4")
    assert (row.executor, row.reason.partition(":")[0]) == ("", "gate_up_proj is dense")


def test_a_norm_after_each_expert_is_said() -> None:
    model = meta_model("MuseSparkForConditionalGeneration")
    (row,) = explain_model(model)
    assert (row.kind, row.config, row.executor) == ("MuseSparkExperts", "swiglu post_expert_norm eps=1e-08", "native")
    (row,) = explain_model(model, "grouped_nf4")
    assert (row.executor, row.reason.partition(":")[0]) == ("", "gate_up_proj is dense")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Llama4ForConditionalGeneration", "it has a loop of its own, which transformers does not dispatch"),
    ],
)
def test_what_is_refused_is_said_and_is_the_status(name: str, said: str) -> None:
    status, output = explain("--model", name)
    assert status == 1
    assert said in output


def test_wrong_arguments_are_one_line(tmp_path: Path) -> None:
    for arguments, said in (
        (["--model", "LlamaForCausalLM"], "error: --model LlamaForCausalLM: must have experts; it has none"),
        (["--model", "Nope"], "error: --model 'Nope': must be a folder, or a model class of transformers"),
        (
            ["--model", "MixtralConfig"],
            "error: --model 'MixtralConfig': must be a folder, or a model class of transformers",
        ),
        (["--model", str(tmp_path)], f"error: --model {tmp_path}: must have a config.json of a known model"),
        (["--executor", "native"], "error: --executor native: must go with --model"),
        (["file", "--model", "x"], "error: FILE file: must be left out with --model x"),
        (["--model", "MixtralForCausalLM", "--executor", "no"], "error: --executor 'no': must be one of"),
    ):
        status, output = explain(*arguments)
        assert status == 2
        assert output.startswith(said)


def test_architectures_must_be_known(tmp_path: Path) -> None:
    status, output = explain("--model", config(tmp_path, architectures=["NoSuchModel"]))
    assert status == 2
    assert "architectures=['NoSuchModel']: must name a class of transformers" in output
