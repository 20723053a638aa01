"""The command that takes a layer out of a checkpoint: what it writes, prints, and refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

import executors
import tiny_models
from checkpoint_cases import (
    GPT_OSS,
    MIXTRAL,
    PREFIX,
    SPARSE,
    E,
    H,
    I,
    folder,
    gpt_oss,
    merged,
    mixtral,
    random,
    same_layer,
)
from executors import mxfp4
from executors._cli.app import app
from executors.layer_file import Layer, load_layer
from moe_ref import MoEConfig, MoEWeights
from moe_ref import mxfp4 as specification


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["extract", *map(str, arguments)])


def extracted(path: Path, *arguments: object) -> Layer:
    """The layer file that the command wrote."""
    out = path.parent / "layer.safetensors"
    result = run(path, "--layer", 0, "-o", out, *arguments)
    assert result.exit_code == 0, result.output
    return load_layer(out)


def refused(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    return line


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return folder(tmp_path / "model", mixtral(), MIXTRAL)


def test_layer_file_holds_the_layer_and_drawn_hidden_states(model: Path) -> None:
    layer = extracted(model, "--tokens", 7, "--seed", 3)
    up, down = merged(mixtral())
    assert torch.equal(layer.weights.gate_up_proj, up)
    assert torch.equal(layer.weights.down_proj, down)
    assert layer.weights.config == MoEConfig(2, renormalize=True, renormalize_eps=0.0)
    assert (layer.x.shape, layer.x.dtype) == ((7, H), torch.bfloat16)
    drawn = torch.randn(7, H, generator=torch.Generator().manual_seed(3))
    assert torch.equal(layer.x, (drawn / drawn.square().mean(dim=1, keepdim=True).sqrt()).bfloat16())
    assert torch.equal(layer.router_logits, torch.nn.functional.linear(layer.x, mixtral()[f"{SPARSE}gate.weight"]))
    assert layer.source == f"layer 0 ({SPARSE[:-1]}) of model, family mixtral; hidden states drawn with seed 3"
    assert [path.name for path in sorted(model.parent.iterdir())] == ["layer.safetensors", "model"]


def test_what_is_printed(model: Path) -> None:
    out = model.parent / "mine.safetensors"
    lines = " ".join(run(model, "--layer", SPARSE, "-o", out).stdout.split())
    assert f"layer 0 ({SPARSE[:-1]}) of model, family mixtral" in lines
    assert f"{E} experts, H={H}, I={I}, bfloat16, 64 tokens; MoEConfig(top_k=2" in lines
    assert "mine.safetensors (0.1 MB, 0 s)" in lines.replace("mine. safetensors", "mine.safetensors")
    assert "next: python -m executors compare" in lines


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text"])
def test_executors_agree_with_the_model_on_the_layer_file(family: str, tmp_path: Path) -> None:
    model = tiny_models.tiny_model(family)
    tiny_models.saved(model, tmp_path / "model")
    layer = extracted(tmp_path / "model")
    y = executors.get("native")(layer.x, layer.router_logits, layer.weights)
    logits, _, expected = tiny_models.outputs(tiny_models.blocks(model)[0], layer.x)
    torch.testing.assert_close(layer.router_logits, logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_other_commands_take_what_extract_writes(model: Path) -> None:
    extracted(model, "--tokens", 8)
    result = CliRunner().invoke(app, ["explain", str(model.parent / "layer.safetensors")])
    assert result.exit_code == 0, result.output
    assert "auto chooses" in result.stdout


def test_stacks_keep_the_order_in_which_they_are_stored(tmp_path: Path) -> None:
    layer = extracted(folder(tmp_path / "model", gpt_oss(), GPT_OSS))
    same_layer(layer.weights, gpt_oss())
    assert not layer.weights.gate_up_proj.is_contiguous()  # a view, as in the checkpoint
    expected = torch.nn.functional.linear(
        layer.x, gpt_oss()[f"{PREFIX}router.weight"], gpt_oss()[f"{PREFIX}router.bias"]
    )
    assert torch.equal(layer.router_logits, expected)


def test_given_hidden_states(model: Path) -> None:
    x = random(5, H, dtype=torch.float32)
    save_file({"x": x}, model.parent / "x.safetensors")
    layer = extracted(model, "--hidden", model.parent / "x.safetensors")
    assert torch.equal(layer.x, x.bfloat16())
    assert layer.source.endswith("hidden states of x.safetensors")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_dtype_rounds_weights_and_hidden_states(dtype: str, model: Path) -> None:
    layer = extracted(model, "--dtype", dtype)
    own = getattr(torch, dtype)
    assert {layer.x.dtype, layer.weights.gate_up_proj.dtype, layer.weights.down_proj.dtype} == {own}
    assert torch.equal(layer.weights.gate_up_proj, merged(mixtral())[0].to(own))
    assert layer.router_logits.dtype == torch.float32  # of fp16 and the router's own bf16: both exact


def packed(path: Path) -> tuple[Path, MoEWeights]:
    weights = mxfp4.quantize(MoEWeights(random(E, 2 * I, H), random(E, H, I), config=MoEConfig(2)))
    router = {f"{PREFIX}router.weight": random(E, H), f"{PREFIX}router.bias": random(E)}
    return folder(path, mxfp4.to_state_dict(weights, f"{PREFIX}experts.") | router, GPT_OSS), weights


def test_four_bits_are_decoded_only_where_that_is_asked_for(tmp_path: Path) -> None:
    model, weights = packed(tmp_path / "model")
    line = refused(model, "--layer", 0, "-o", tmp_path / "layer.safetensors")
    assert line == f"error: {model}: layer 0 is in 4 bits (mxfp4): must be dense in a layer file: decode it (--decode)"
    assert not (tmp_path / "layer.safetensors").exists()
    layer = extracted(model, "--decode")
    for name, tensor in weights.packed().items():
        assert torch.equal(getattr(layer.weights, name).float(), specification.decode(tensor))


def test_list_fits_a_terminal(tmp_path: Path) -> None:
    prefix = "model.language_model.layers.1.block_sparse_moe."
    result = run(folder(tmp_path / "model", mixtral() | mixtral(prefix), MIXTRAL), "--list")
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]
    assert rows[0] == ["0", SPARSE, "dense, per expert", "mixtral"]
    assert rows[1][0] == "1"
    assert "".join(row[1] for row in rows[1:]) == prefix


def test_list_says_where_a_family_must_be_named(tmp_path: Path) -> None:
    model = folder(tmp_path / "model", gpt_oss(), {"model_type": "our_own", "num_experts_per_tok": 2})
    text = " ".join(run(model, "--list").stdout.split())
    assert "unknown: needs --family" in text
    assert "gpt_oss" in run(model, "--list", "--family", "gpt_oss").stdout
    assert "or family= must be given" in refused(model, "--layer", 0)
    assert run(model, "--layer", 0, "--family", "gpt_oss", "-o", tmp_path / "x").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--layer is missing: must be one of 0, or a prefix that --list shows"),
        (["--layer", 4], "has no layer 4: must be one of 0, or a prefix"),
        (["--layer", 0, "--dtype", "int8"], "--dtype int8: must be one of float64, float32, bfloat16, float16"),
        (["--layer", 0, "--family", "nobody"], "--family nobody: must be one of afmoe, aria_text, "),
        (["--layer", 0, "--tokens", 0], "--tokens 0: must be at least 1"),
        (["--layer", 0, "--hidden", "gone"], "gone: must be a file that exists"),
        (["--layer", 0, "-o", "no/such/folder/x"], "--out no/such/folder/x: must be a file in a folder that exists"),
    ],
)
def test_bad_arguments_exit_with_2_and_one_line(arguments: list[Any], expected: str, model: Path) -> None:
    assert expected in refused(model, *arguments)


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"y": torch.zeros(2, H)}, 'must have a tensor "x", of hidden states'),
        ({"x": torch.zeros(H)}, f"x is torch.float32 ({H},): must be floats of shape (T, H), T at least 1"),
        ({"x": torch.zeros(0, H)}, f"x is torch.float32 (0, {H}): must be floats"),
        ({"x": torch.zeros(2, H, dtype=torch.int64)}, "x is torch.int64"),
        ({"x": torch.full((2, H), torch.inf)}, "x has NaN or infinite elements in torch.bfloat16: must be finite"),
        ({"x": torch.zeros(2, H + 1)}, f"x.shape=(2, {H + 1}): must be (T, {H}), as the router"),
    ],
)
def test_hidden_states_that_do_not_fit(tensors: dict[str, torch.Tensor], expected: str, model: Path) -> None:
    file = model.parent / "x.safetensors"
    save_file(tensors, file)
    line = refused(model, "--layer", 0, "--hidden", file)
    assert line.startswith(f"error: {file}: ")
    assert expected in line


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    state = mixtral()
    state[f"{SPARSE}experts.1.w2.weight"][0, 0] = torch.nan
    line = refused(folder(tmp_path / "model", state, MIXTRAL), "--layer", 0)
    assert line.endswith(f"{SPARSE}: down_proj has NaN or infinite elements: must be finite in a layer file")


def test_router_with_other_experts(tmp_path: Path) -> None:
    state = mixtral() | {f"{SPARSE}gate.weight": random(E + 1, H)}
    line = refused(folder(tmp_path / "model", state, MIXTRAL), "--layer", 0)
    assert line.endswith(f"{SPARSE}experts are {E}: must be {E + 1}, as its router has rows")


def test_experts_behind_a_projection_have_no_logits_of_their_own(tmp_path: Path) -> None:
    """Nemotron's latent experts: the router sees the hidden states, the experts a projection of them."""
    state = {f"{PREFIX}gate.weight": random(E, 2 * H), f"{PREFIX}gate.e_score_correction_bias": random(E)}
    for expert in range(E):
        state[f"{PREFIX}experts.{expert}.up_proj.weight"] = random(I, H)
        state[f"{PREFIX}experts.{expert}.down_proj.weight"] = random(H, I)
    model = folder(tmp_path / "model", state, {"model_type": "nemotron_h", "num_experts_per_tok": 2})
    assert f"experts have H={H}: must be those of its router, H={2 * H}" in refused(model, "--layer", 0)


def test_a_failed_write_leaves_the_old_file(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = model.parent / "layer.safetensors"
    out.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    line = refused(model, "--layer", 0, "-o", out)
    assert line == f"error: --out {out}: must be a file that can be written: No space left on device"
    assert out.read_bytes() == b"old"
    assert sorted(path.name for path in model.parent.iterdir()) == ["layer.safetensors", "model"]
