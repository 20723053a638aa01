"""What no checkpoint can be read exactly from is refused in one line: file, key, what is there, what is allowed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import executors
from checkpoint_cases import MIXTRAL, PREFIX, SPARSE, E, H, folder, gpt_oss, mixtral, random, read, refused
from executors import checkpoint
from executors.checkpoint.shards import INDEX
from executors.checkpoint.table import FAMILIES, REFUSED

DEEPSEEK = {"model_type": "deepseek_v3", "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}


# Folders and files.


def test_path_must_be_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(mixtral(), file)
    assert refused(lambda: checkpoint.open(file)) == (
        f"{file}: must be a folder with config.json and .safetensors files"
    )


def test_pickled_weights_are_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    monkeypatch.setattr("torch.load", opened)
    torch.save(mixtral(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    assert refused(lambda: checkpoint.open(tmp_path)) == (
        f"{tmp_path} has no .safetensors file: must have one, and pytorch_model.bin is never opened, "
        "since unpickling runs code"
    )


def test_empty_folder(tmp_path: Path) -> None:
    assert refused(lambda: checkpoint.open(tmp_path)) == f"{tmp_path} has no .safetensors file: must have one"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "must be a file that exists"),
        ("{", "must be JSON, but Expecting property name"),
        ("[1]", "holds [1]: must be a JSON object"),
        ("[" * 100_000, "must be JSON, but"),
    ],
)
def test_config_json_must_be_an_object(text: str | None, expected: str, tmp_path: Path) -> None:
    folder(tmp_path, mixtral(), MIXTRAL)
    file = tmp_path / "config.json"
    file.unlink() if text is None else file.write_text(text)
    message = refused(lambda: checkpoint.open(tmp_path))
    assert message.startswith(str(file))
    assert expected in message


@pytest.mark.parametrize(
    ("weight_map", "expected"),
    [
        ({"k": "gone.safetensors"}, "gone.safetensors: must be a file that exists, since"),
        ({"k": "../outside.safetensors"}, "'../outside.safetensors': must be a .safetensors file in the same folder"),
        ({"k": "model.bin"}, "'model.bin': must be a .safetensors file in the same folder"),
        ({"k": 3}, "weight_map={'k': 3}: must be an object from keys to file names"),
        (None, "weight_map=None: must be an object from keys to file names"),
    ],
)
def test_index_must_name_files_of_the_folder(weight_map: Any, expected: str, tmp_path: Path) -> None:
    folder(tmp_path, mixtral(), MIXTRAL)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert expected in refused(lambda: checkpoint.open(tmp_path))


def test_index_that_is_wrong_about_a_file(tmp_path: Path) -> None:
    state = mixtral()
    folder(tmp_path, {"other": torch.zeros(1)}, MIXTRAL)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(state, "model.safetensors")}))
    message = refused(lambda: read(tmp_path))
    assert message.startswith(
        f"{tmp_path / 'model.safetensors'}: {SPARSE}experts.0.w1.weight is missing: must be there, since "
    )


def test_a_key_in_two_files(tmp_path: Path) -> None:
    folder(tmp_path, mixtral(), MIXTRAL)
    save_file({f"{SPARSE}gate.weight": torch.zeros(1)}, tmp_path / "z.safetensors")
    assert refused(lambda: checkpoint.open(tmp_path)) == (
        f"{tmp_path / 'z.safetensors'}: {SPARSE}gate.weight is also in model.safetensors: "
        f"must be in one file, or {INDEX} must say in which"
    )


def test_truncated_file(tmp_path: Path) -> None:
    folder(tmp_path, mixtral(), MIXTRAL)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert refused(lambda: checkpoint.open(tmp_path)).startswith(f"{file}: must be a safetensors file, but ")


def test_dense_model(tmp_path: Path) -> None:
    state = {"model.layers.0.mlp.gate_proj.weight": random(4, 4)}
    assert "has no Mixture-of-Experts layer" in refused(lambda: checkpoint.open(folder(tmp_path, state, MIXTRAL)))


def test_layer_that_is_not_there(tmp_path: Path) -> None:
    opened = checkpoint.open(folder(tmp_path, mixtral(), MIXTRAL))
    for which in (3, "model.layers.3."):
        expected = f"{tmp_path} has no layer {which}: must be one of 0, or a prefix"
        assert refused(lambda: opened.weights(which)) == expected  # noqa: B023


# Families.


@pytest.mark.parametrize("action", ["weights", "router", "config"])
def test_stacks_of_an_unknown_family_are_not_guessed(action: str, tmp_path: Path) -> None:
    """[E, n, n] could be read in two orders and two layouts."""
    state = {f"{PREFIX}experts.gate_up_proj": random(E, H, H), f"{PREFIX}experts.down_proj": random(E, H, H // 2)}
    opened = checkpoint.open(folder(tmp_path, state, {"model_type": "new_moe", "num_experts_per_tok": 2}))
    message = refused(lambda: getattr(opened, action)(0))
    assert message.startswith(
        f"{tmp_path / 'config.json'}: model_type='new_moe' does not tell how {PREFIX}experts is to be read: "
        "must be one family, or family= must be given, one of afmoe, aria_text, "
    )
    assert message.endswith(", ".join(sorted(FAMILIES)))


@pytest.mark.parametrize("config", [{}, {"text_config": {"hidden_size": 4}}, {"text_config": 3}])
def test_config_without_a_model_type(config: dict[str, Any], tmp_path: Path) -> None:
    message = refused(lambda: read(folder(tmp_path, gpt_oss(), config)))
    assert "model_type='missing' does not tell" in message


def test_several_families_that_the_prefix_does_not_tell_apart(tmp_path: Path) -> None:
    config = {"a_config": MIXTRAL, "b_config": {**MIXTRAL, "model_type": "olmoe"}}
    assert "'mixtral, olmoe' does not tell" in refused(lambda: read(folder(tmp_path, mixtral(), config)))


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_families_that_cannot_be_expressed_are_refused_by_name(family: str, tmp_path: Path) -> None:
    config = {"model_type": "whole", "text_config": {"model_type": family, "num_experts_per_tok": 2}}
    opened = checkpoint.open(folder(tmp_path, mixtral("language_model.layers.0.mlp."), config))
    for action in (opened.weights, opened.router, opened.config):
        expected = f"{tmp_path / 'config.json'}: model_type={family!r} is not read: {REFUSED[family]}"
        assert refused(lambda: action(0)) == expected  # noqa: B023


def test_family_that_is_none(tmp_path: Path) -> None:
    message = refused(lambda: checkpoint.open(folder(tmp_path, mixtral(), MIXTRAL), family="mixtral2"))
    assert message == f"family='mixtral2': must be one of {', '.join(sorted(FAMILIES))}"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"model_type": "mixtral"},
            "num_experts_per_tok is missing in it: must be there, for a model of family mixtral",
        ),
        (MIXTRAL | {"num_experts_per_tok": "two"}, "top_k='two'"),
        (MIXTRAL | {"num_experts_per_tok": 0}, "top_k=0"),
        (MIXTRAL | {"num_experts_per_tok": E + 1}, f"top_k={E + 1}"),
        (MIXTRAL | {"hidden_act": "quick_gelu"}, "activation 'quick_gelu': must be one of silu, swish, gelu, "),
        (MIXTRAL | {"hidden_act": None}, "activation None: must be one of silu, "),
        (DEEPSEEK | {"scoring_func": "softmax"}, "scoring_func='softmax': must be 'sigmoid': deepseek_v3 has no other"),
        (DEEPSEEK | {"topk_method": "greedy"}, "topk_method='greedy': must be 'noaux_tc'"),
        (DEEPSEEK | {"n_group": 3}, "num_groups=3"),
        (
            DEEPSEEK | {"model_type": "deepseek_v4", "mlp_layer_types": ["hash_moe", "moe"]},
            "mlp_layer_types='hash_moe': must be 'moe': deepseek_v4 has no other here",
        ),
        (DEEPSEEK | {"model_type": "deepseek_v4"}, "mlp_layer_types is missing in it: must be there"),
        (DEEPSEEK | {"model_type": "axk2"}, "n_group=2: must be None or 1: axk2 has no other"),
        (DEEPSEEK | {"model_type": "deepseek_v2", "topk_method": "best"}, "must be 'greedy' or 'group_limited_greedy'"),
        (DEEPSEEK | {"model_type": "deepseek_v2", "norm_topk_prob": True}, "norm_topk_prob=True: must be False"),
        (MIXTRAL | {"model_type": "laguna", "moe_router_logit_softcapping": 30.0}, "softcapping=30.0: must be 0.0"),
        (MIXTRAL | {"model_type": "cohere2_moe", "expert_selection_fn": "max"}, "must be 'softmax' or 'sigmoid'"),
    ],
)
def test_entries_of_config_json(config: dict[str, Any], expected: str, tmp_path: Path) -> None:
    state = mixtral() | {f"{SPARSE}gate.e_score_correction_bias": random(E)}
    message = refused(lambda: read(folder(tmp_path, state, config)))
    assert str(tmp_path) in message
    assert expected in message


def test_import_of_executors_drags_in_no_checkpoints() -> None:
    import subprocess
    import sys

    program = "import executors, sys; print('executors.checkpoint' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "False\n"
    )
    program = "import executors; executors.checkpoint.open; import sys; print('transformers' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "False\n"
    )
    assert executors.checkpoint is checkpoint


@pytest.mark.parametrize(
    ("path", "family", "said"),
    [(5, None, "path=5: must be text or a path"), ("x", ["mixtral"], "family=['mixtral']: must be text, or None")],
)
def test_arguments_of_open(path: Any, family: Any, said: str) -> None:
    with pytest.raises(TypeError) as caught:
        checkpoint.open(path, family)
    assert str(caught.value) == said


def test_the_last_expert_must_not_be_missing(tmp_path: Path) -> None:
    """As where a shard is gone and there is no index."""
    state = {key: value for key, value in mixtral().items() if f".experts.{E - 1}." not in key}
    message = refused(lambda: read(folder(tmp_path, state, MIXTRAL)))
    assert message.endswith(f"{SPARSE}experts are {E - 1}: must be {E}, as its router has rows")


@pytest.mark.parametrize("family", ["axk2", "bailing_hybrid", "kimi_linear"])
def test_relatives_of_deepseek_v3_refuse_what_it_refuses(family: str) -> None:
    entries = {name for entry in FAMILIES[family].cases for name in entry.names}
    assert {"scoring_func", "topk_method"} <= entries


def test_a_number_of_experts_per_token_must_not_be_null(tmp_path: Path) -> None:
    message = refused(lambda: read(folder(tmp_path, mixtral(), MIXTRAL | {"num_experts_per_tok": None})))
    assert message.endswith("num_experts_per_tok=null: must be a number of experts")
