"""What no checkpoint can be read exactly from is refused in one line: file, key, what is there, what is allowed."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import executors
from checkpoint_cases import GPT_OSS, MIXTRAL, PREFIX, SPARSE, E, H, I, State, folder, gpt_oss, mixtral, random
from executors import checkpoint, mxfp4, nf4
from executors.checkpoint.shards import INDEX
from executors.checkpoint.table import FAMILIES, REFUSED
from moe_ref import MoEConfig, MoEWeights

DEEPSEEK = {"model_type": "deepseek_v3", "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}


def refused(action: Callable[[], object]) -> str:
    """The message, which is one line."""
    with pytest.raises(checkpoint.BadCheckpoint) as caught:
        action()
    assert isinstance(caught.value, ValueError)
    message = str(caught.value)
    assert "\n" not in message
    return message


def read(path: Path, family: str | None = None) -> None:
    """Opens a checkpoint, and reads its first layer and its router."""
    opened = checkpoint.open(path, family)
    opened.weights(opened.layers[0])
    opened.router(opened.layers[0])


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
    assert message.startswith(f"{tmp_path / 'model.safetensors'}: {SPARSE}experts.0.w1.weight cannot be read: ")


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


# Keys and shapes.

Change = Callable[[State], object]


def key(expert: int, name: str, ending: str = "weight") -> str:
    return f"{SPARSE}experts.{expert}.{name}.{ending}"


def put(state: State, name: str, value: torch.Tensor) -> None:
    state[name] = value


PER_EXPERT: list[tuple[Change, str]] = [
    (lambda s: s.pop(key(2, "w3")), f"{key(2, 'w3')} is missing: must be there"),
    (lambda s: [s.pop(key(e, "w3")) for e in range(E)], f"{key(0, 'w3')} is missing: must be there"),
    (lambda s: [s.pop(key(0, n)) for n in ("w1", "w2", "w3")], f"{key(0, 'w1')} is missing: must be there"),
    (lambda s: put(s, key(1, "w1"), random(I, H + 1)), f"{key(1, 'w1')} is BF16 {(I, H + 1)}: must be BF16 {(I, H)}"),
    (lambda s: put(s, key(1, "w3"), random(I, H).float()), f"{key(1, 'w3')} is F32 {(I, H)}: must be BF16 {(I, H)}"),
    (lambda s: put(s, key(3, "w2"), random(H, I + 1)), f"{key(3, 'w2')} is BF16 {(H, I + 1)}: must be"),
    (
        lambda s: [put(s, key(e, "w1"), s[key(e, "w1")].to(torch.float8_e4m3fn)) for e in range(E)],
        f"{key(0, 'w1')} is F8_E4M3: must be F64, F32, BF16, F16, or in 4 bits",
    ),
    (lambda s: put(s, key(0, "w1", "weight_scale_inv"), random(1)), f"{key(0, 'w1', 'weight_scale_inv')} is not under"),
    (lambda s: put(s, key(0, "w1", "qweight"), random(1)), f"{key(0, 'w1', 'qweight')} is not understood: must be one"),
    (lambda s: put(s, key(0, "w1", "bias"), random(I)), f"{key(0, 'w1', 'bias')} is not understood: must be one of"),
    (lambda s: put(s, key(0, "w1"), random(I)), f"{key(0, 'w1')} has shape ({I},): must have 2 dimensions"),
    (lambda s: [put(s, key(e, "w2"), random(H + 1, I)) for e in range(E)], "must be"),
    (lambda s: s.pop(f"{SPARSE}gate.weight"), f"{SPARSE}gate.weight is missing: must be there, for this family"),
    (lambda s: put(s, f"{SPARSE}gate.weight", random(E)), f"gate.weight has shape ({E},): must be (E, H)"),
]


@pytest.mark.parametrize("case", range(len(PER_EXPERT)))
def test_tensors_of_experts(case: int, tmp_path: Path) -> None:
    change, expected = PER_EXPERT[case]
    state = mixtral()
    change(state)
    message = refused(lambda: read(folder(tmp_path, state, MIXTRAL)))
    assert message.startswith(str(tmp_path))
    assert expected in message


STACKS: list[tuple[Change, str]] = [
    (
        lambda s: [
            put(s, f"{PREFIX}experts.{n}", s[f"{PREFIX}experts.{n}"].mT.clone()) for n in ("gate_up_proj", "down_proj")
        ],
        f"have shapes {(E, 2 * I, H)} and {(E, H, I)}: must be (E, H, 2I) and (E, I, H), as family gpt_oss stores them",
    ),
    (lambda s: s.pop(f"{PREFIX}experts.gate_up_proj"), f"{PREFIX}experts.gate_up_proj is missing"),
    (lambda s: put(s, f"{PREFIX}experts.gate_up_proj", random(E, H)), "must be (E, H, 2I) and (E, I, H)"),
    (lambda s: put(s, f"{PREFIX}experts.down_proj", random(E + 1, I, H)), "must be (E, H, 2I) and (E, I, H)"),
    (lambda s: put(s, f"{PREFIX}experts.down_proj", random(E, I - 2, H)), "must be (E, H, 2I) and (E, I, H)"),
    (lambda s: put(s, f"{PREFIX}experts.down_proj_bias", random(E, H + 1)), "down_proj_bias.shape="),
    (lambda s: put(s, f"{PREFIX}experts.down_proj_scale", random(1)), "experts.down_proj_scale is not understood"),
    (lambda s: s.pop(f"{PREFIX}router.bias"), f"{PREFIX}router.bias is missing: must be there, for this family"),
    (lambda s: put(s, f"{PREFIX}router.bias", random(E + 1)), f"has shape {(E, H)} and {(E + 1,)}: must be (E, H)"),
    (lambda s: put(s, f"{PREFIX}experts.down_proj", torch.zeros(E, I, H, dtype=torch.int8)), "experts.down_proj is I8"),
]


@pytest.mark.parametrize("case", range(len(STACKS)))
def test_stacks(case: int, tmp_path: Path) -> None:
    change, expected = STACKS[case]
    state = gpt_oss()
    change(state)
    message = refused(lambda: read(folder(tmp_path, state, GPT_OSS)))
    assert message.startswith(str(tmp_path))
    assert expected in message


def test_gates_where_the_family_has_none_and_the_other_way_around(tmp_path: Path) -> None:
    config = MIXTRAL | {"model_type": "nemotron_h"}
    message = refused(lambda: read(folder(tmp_path, mixtral(), config)))
    assert message.endswith("have gate and up projections: must have none, as family nemotron_h has")
    plain = {f"{PREFIX}experts.0.up_proj.weight": random(I, H), f"{PREFIX}experts.0.down_proj.weight": random(H, I)}
    message = refused(lambda: read(folder(tmp_path, plain, MIXTRAL)))
    assert message.endswith("have no gate projections: must have them, as family mixtral has")


@pytest.mark.parametrize(
    ("shape", "expected"),
    [(None, f"{SPARSE}gate.e_score_correction_bias is missing: must be there, for this family"), ((E + 1,), "shape=")],
)
def test_selection_bias(shape: tuple[int, ...] | None, expected: str, tmp_path: Path) -> None:
    state = mixtral() | ({} if shape is None else {f"{SPARSE}gate.e_score_correction_bias": random(*shape)})
    assert expected in refused(lambda: read(folder(tmp_path, state, DEEPSEEK)))


# 4 bits.


def packed_stacks() -> State:
    state = {name: value for name, value in gpt_oss().items() if "experts" not in name}
    for name, shape in (("gate_up_proj", (E, H, 2 * I)), ("down_proj", (E, I, H))):
        state |= nf4.to_state_dict(nf4.quantize_tensor(random(*shape)), f"{PREFIX}experts.{name}")
    return state


def packed_experts() -> State:
    state = {}
    for name, value in mixtral().items():
        state |= {name: value} if "gate" in name else nf4.to_state_dict(nf4.quantize_tensor(value), name)
    return state


def blocks() -> State:
    weights = mxfp4.quantize(MoEWeights(random(E, 2 * I, H), random(E, H, I), config=MoEConfig(2)))
    return mxfp4.to_state_dict(weights, f"{PREFIX}experts.")


UP = f"{PREFIX}experts.gate_up_proj"
PACKED: list[tuple[Callable[[], State], dict[str, Any], Change, str]] = [
    (packed_stacks, GPT_OSS, lambda s: s.pop(f"{UP}.absmax"), f"'{UP}.absmax' is missing"),
    (packed_stacks, GPT_OSS, lambda s: put(s, UP, s[UP][:-1]), f"{UP} has {E * H * I - 1} bytes: must be"),
    (packed_stacks, GPT_OSS, lambda s: s.pop(f"{UP}.quant_state.bitsandbytes__nf4"), f"{UP} is not in 4 bits: must"),
    (packed_stacks, MIXTRAL, lambda s: None, "must be (E, 2I, H) and (E, H, I), as family mixtral stores them"),
    (packed_experts, MIXTRAL, lambda s: s.pop(key(2, "w3", "weight.absmax")), f"'{key(2, 'w3')}.absmax' is missing"),
    (packed_experts, MIXTRAL, lambda s: s.pop(key(2, "w3")), f"'{key(2, 'w3')}' is missing"),
    (
        packed_experts,
        MIXTRAL,
        lambda s: s.update(nf4.to_state_dict(nf4.quantize_tensor(random(I, H), blocksize=32), key(1, "w1"))),
        f"{key(1, 'w1')}.blocksize=32: must be 64, that of {key(0, 'w1')}",
    ),
    (
        lambda: {n: v for n, v in packed_experts().items() if ".w3." not in n},
        MIXTRAL,
        lambda s: s.update({key(e, "w3"): random(I, H) for e in range(E)}),
        "are dense, nf4: must be stored alike",
    ),
    (blocks, GPT_OSS, lambda s: s.pop(f"{UP}_scales"), f"{UP}_scales is missing: must be there"),
    (blocks, GPT_OSS, lambda s: put(s, f"{UP}_blocks", s[f"{UP}_blocks"][:, :-1]), "must be"),
    (
        blocks,
        GPT_OSS | {"dtype": "float64"},
        lambda s: None,
        "dtype='float64': must be one of float32, bfloat16, float16",
    ),
]


@pytest.mark.parametrize("case", range(len(PACKED)))
def test_four_bits(case: int, tmp_path: Path) -> None:
    make, config, change, expected = PACKED[case]
    state = make()
    change(state)
    message = refused(lambda: read(folder(tmp_path, state, config)))
    assert message.startswith(str(tmp_path))
    assert expected in message


def test_blocks_that_straddle_experts_are_not_joined(tmp_path: Path) -> None:
    state = {f"{SPARSE}gate.weight": random(E, 20)}
    for name, value in mixtral(rows=33).items():
        if "gate" not in name:
            own = value[:33, :20] if value.shape[0] == 33 else value[:20, :33]
            state |= nf4.to_state_dict(nf4.quantize_tensor(own.contiguous()), name)
    message = refused(lambda: read(folder(tmp_path, state, MIXTRAL)))
    assert re.search(r"has 660 numbers: must be a multiple of blocksize=64", message)


def test_hidden_states_of_another_size_are_refused_by_the_router(tmp_path: Path) -> None:
    router = checkpoint.open(folder(tmp_path, mixtral(), MIXTRAL)).router(0)
    with pytest.raises(ValueError, match=rf"x.shape=\(2, {H + 1}\): must be \(T, {H}\)"):
        router.logits(random(2, H + 1))


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
