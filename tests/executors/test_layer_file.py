"""Layer files: what is written is read, and what is no layer is refused in one line."""

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from executors.layer_file import BadLayerFile, bundled_layer, load_layer, save_layer
from moe_ref import MoEConfig, MoEWeights

CONFIG = MoEConfig(2, scoring="sigmoid", renormalize=True, limit=7.0, gate_up_layout="interleaved")
T, E, H, INTERMEDIATE = 5, 3, 4, 6


def weights() -> MoEWeights:
    generator = torch.Generator().manual_seed(0)
    shapes = ((E, 2 * INTERMEDIATE, H), (E, H, INTERMEDIATE), (E, 2 * INTERMEDIATE))
    return MoEWeights(*(torch.randn(s, generator=generator).bfloat16() for s in shapes), config=CONFIG)


def save(path: Path, transposed: tuple[str, ...] = ()) -> Path:
    save_layer(path, torch.ones(T, H).bfloat16(), torch.zeros(T, E), weights(), "made up", transposed)
    return path


@pytest.mark.parametrize("transposed", [(), ("gate_up_proj",), ("gate_up_proj", "down_proj")])
def test_what_is_written_is_read(tmp_path: Path, transposed: tuple[str, ...]) -> None:
    layer = load_layer(save(tmp_path / "layer.safetensors", transposed))
    assert layer.weights.config == CONFIG
    assert layer.source == "made up"
    for name in ("gate_up_proj", "down_proj", "gate_up_proj_bias"):
        assert torch.equal(getattr(layer.weights, name), getattr(weights(), name))
    assert layer.weights.down_proj_bias is None
    assert layer.weights.gate_up_proj.is_contiguous() == ("gate_up_proj" not in transposed)


def test_no_part_of_a_layer_is_lost(tmp_path: Path) -> None:
    """Each field of MoEWeights that a layer without adapters may have."""
    of_expert = {"selection_bias": torch.arange(E).float(), "expert_scale": torch.arange(1, E + 1).bfloat16()}
    config = replace(CONFIG, post_expert_norm_eps=1e-8)
    whole = replace(weights(), config=config, down_proj_bias=torch.ones(E, H).bfloat16(), **of_expert)
    whole = replace(whole, post_expert_norm=torch.arange(H).double())
    path = tmp_path / "layer.safetensors"
    save_layer(path, torch.ones(T, H).bfloat16(), torch.zeros(T, E), whole)
    found = load_layer(path).weights
    assert found.config == config
    for field in fields(MoEWeights):
        if field.name not in ("config", "lora"):
            assert torch.equal(getattr(found, field.name), getattr(whole, field.name)), field.name


def test_nothing_but_the_file_is_left(tmp_path: Path) -> None:
    save(tmp_path / "layer.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["layer.safetensors"]


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "layer.safetensors")
    before = path.read_bytes()

    def stopped(*_args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", stopped)
    with pytest.raises(OSError, match="disk full"):
        save(path, ("down_proj",))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["layer.safetensors"]


def test_bundled_layer_is_one() -> None:
    layer = load_layer(bundled_layer())
    assert layer.weights.num_experts >= 32
    assert layer.weights.config.top_k == 4
    assert layer.weights.config.gate_up_layout == "interleaved"
    assert not layer.weights.gate_up_proj.is_contiguous()
    assert layer.path.stat().st_size < 6e6


Spoil = Callable[[dict[str, torch.Tensor], dict[str, str]], object]

BAD: dict[str, tuple[Spoil, str]] = {
    "no x": (lambda t, m: t.pop("x"), "tensor x is missing: must have x, router_logits, gate_up_proj, down_proj"),
    "another tensor": (lambda t, m: t.update(bias=torch.ones(1)), "tensor bias is unknown: must be one of x, "),
    "no format": (lambda t, m: m.pop("format"), "metadata format=None: must be 'moe-ref layer 1'"),
    "other format": (lambda t, m: m.update(format="x"), "metadata format='x': must be 'moe-ref layer 1'"),
    "no config": (lambda t, m: m.pop("config"), "metadata config='': must be JSON"),
    "config no object": (lambda t, m: m.update(config="[1]"), "metadata config=[1]: must be an object with top_k"),
    "config unknown": (
        lambda t, m: m.update(config=json.dumps({"top_k": 1, "topk": 2})),
        "metadata config has topk: must be one of top_k, scoring, ",
    ),
    "config value": (
        lambda t, m: m.update(config=json.dumps({"top_k": 1, "scoring": "max"})),
        "scoring='max': must be one of ",
    ),
    "transposed unknown": (
        lambda t, m: m.update(transposed='["x"]'),
        "metadata transposed=['x']: must be a list out of gate_up_proj, down_proj",
    ),
    "transposed twice": (
        lambda t, m: m.update(transposed='["down_proj", "down_proj"]'),
        "metadata transposed=['down_proj', 'down_proj']: must be a list out of ",
    ),
    "config of two lines": (
        lambda t, m: m.update(config=json.dumps({"top_k": 1, "a\nb": 2})),
        "metadata config has 'a\\nb': must be one of ",
    ),
    "config too deep": (lambda t, m: m.update(config="[" * 100_000), "metadata config='[[["),
    "config too long a number": (lambda t, m: m.update(config="9" * 5000), "metadata config='999"),
    "tensor of two lines": (lambda t, m: t.update({"a\nb": torch.ones(1)}), "tensor 'a\\nb' is unknown: "),
    "no tokens": (
        lambda t, m: t.update(x=t["x"][:0].clone(), router_logits=t["router_logits"][:0].clone()),
        "x.shape=(0, 4): must have at least one token",
    ),
    "NaN in a projection": (lambda t, m: t["down_proj"].fill_(torch.nan), "down_proj has NaN or infinite elements"),
    "masked token": (
        lambda t, m: t["router_logits"][1].fill_(-torch.inf),
        "router_logits has a row of nothing but -inf: must have a finite element",
    ),
    "transposed wrongly": (lambda t, m: m.update(transposed='["down_proj"]'), "down_proj.shape=(3, 6, 4): must be "),
    "narrow": (lambda t, m: t.update(x=t["x"][:, 1:].contiguous()), "x.shape=(5, 3): must be (..., 4)"),
    "integers": (lambda t, m: t.update(x=t["x"].int()), "x.dtype=int32: must be one of float64, "),
    "three dimensions": (lambda t, m: t.update(x=t["x"][None]), "x.shape=(1, 5, 4): must be (T, H)"),
    "NaN": (lambda t, m: t["x"].fill_(torch.nan), "x has NaN or infinite elements: must be finite"),
    "infinite": (
        lambda t, m: t["router_logits"].fill_(torch.inf),
        "router_logits has NaN or +inf elements: must be finite or -inf",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_layer_is_refused_in_one_line(tmp_path: Path, what: str) -> None:
    spoil, message = BAD[what]
    w = weights()
    tensors = {
        "x": torch.ones(T, H).bfloat16(),
        "router_logits": torch.zeros(T, E),
        "gate_up_proj": w.gate_up_proj,
        "down_proj": w.down_proj,
    }
    metadata = {"format": "moe-ref layer 1", "config": json.dumps({"top_k": 2})}
    spoil(tensors, metadata)
    path = tmp_path / "bad.safetensors"
    save_file(tensors, path, metadata)
    with pytest.raises(BadLayerFile) as caught:
        load_layer(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\x10\x00\x00\x00\x00\x00\x00\x00{broken"])
def test_foreign_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "foreign.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadLayerFile, match=r"must be a safetensors file, but "):
        load_layer(path)


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "layer.safetensors")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(BadLayerFile, match=r"must be a safetensors file, but "):
        load_layer(path)


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadLayerFile, match="must be a file that exists"):
        load_layer(tmp_path / "none")
    with pytest.raises(BadLayerFile, match="must be a safetensors file"):
        load_layer(tmp_path)


@pytest.mark.parametrize("transposed", ["down_proj", ("foo",)])
def test_what_is_stored_transposed_is_named(transposed: object, tmp_path: Path) -> None:
    weights = MoEWeights(torch.ones(2, 8, 4), torch.ones(2, 4, 4), config=MoEConfig(1))
    with pytest.raises(ValueError, match=r"transposed=.*: must be a tuple out of gate_up_proj, down_proj"):
        save_layer(tmp_path / "l", torch.ones(1, 4), torch.ones(1, 2), weights, transposed=transposed)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
