"""Tensors from which no layer can be read exactly are refused in one line: key, what is there, what is allowed."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_cases import (
    GPT_OSS,
    MIXTRAL,
    PREFIX,
    SPARSE,
    E,
    H,
    I,
    State,
    folder,
    gpt_oss,
    mixtral,
    random,
    read,
    refused,
)
from executors import checkpoint, mxfp4, nf4
from moe_ref import MoEConfig, MoEWeights

DEEPSEEK = {"model_type": "deepseek_v3", "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
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


@pytest.mark.parametrize(
    ("state", "config", "change", "expected"),
    [(mixtral, MIXTRAL, *case) for case in PER_EXPERT] + [(gpt_oss, GPT_OSS, *case) for case in STACKS],
)
def test_tensors_of_experts(
    state: Callable[[], State], config: dict[str, Any], change: Change, expected: str, tmp_path: Path
) -> None:
    tensors = state()
    change(tensors)
    message = refused(lambda: read(folder(tmp_path, tensors, config)))
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
