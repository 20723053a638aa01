"""4-bit tensors in safetensors files: whole or not at all, and the same bits in another process."""

import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import executors
from executors import nf4
from executors.layer_file import bundled_layer, load_layer, save_layer
from moe_ref import MoEConfig, MoEWeights
from nf4_cases import OLDER, PLAIN, TENSORS, WITH_NESTED, State, decoded, older, random, same, same_entries, small


def test_a_new_process_reads_what_was_saved(tmp_path: Path) -> None:
    """The same bytes, and the same numbers to the last bit."""
    path = tmp_path / "layer.safetensors"
    nf4.save(path, {**TENSORS, "bias": torch.ones(3)})
    program = (
        "import sys; from executors import nf4; from moe_ref.nf4 import decode; import hashlib\n"
        "for name in sys.argv[2:]:\n"
        "    tensor = nf4.load(sys.argv[1], name)\n"
        "    hashes = [hashlib.sha256(a.numpy().tobytes()).hexdigest() for a in (tensor.packed, decode(tensor))]\n"
        "    print(tensor.shape, tensor.dtype, tensor.transposed, *hashes)\n"
    )
    command = [sys.executable, "-c", program, str(path), *TENSORS]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    for line, tensor in zip(ran.stdout.splitlines(), TENSORS.values(), strict=True):
        hashes = [sha256(data).hexdigest() for data in (tensor.packed.numpy().tobytes(), decoded(tensor))]
        assert line == " ".join(map(str, [tensor.shape, tensor.dtype, tensor.transposed, *hashes]))
    assert [file.name for file in tmp_path.iterdir()] == ["layer.safetensors"]
    same_entries(dict(sorted(nf4.to_state_dict(TENSORS["fp4"], "fp4").items())), part(load_file(path), "fp4"))


def test_a_new_process_computes_the_same_bits(tmp_path: Path) -> None:
    """A layer in both storage orders, with nested statistics: saved, loaded elsewhere, and called."""
    path = tmp_path / "layer.safetensors"
    gate_up, down = torch.randn(4, 32, 64).transpose(1, 2), torch.randn(4, 32, 32)
    weights = MoEWeights(gate_up.bfloat16(), down.bfloat16(), config=MoEConfig(2))
    weights = nf4.quantize(weights, nested=True)
    given = {"x": torch.randn(9, 32).bfloat16(), "router_logits": torch.randn(9, 4)}
    nf4.save(path, {**weights.packed(), **given})
    program = (
        "import executors, hashlib, moe_ref, safetensors.torch, sys, torch\n"
        "packed = [executors.nf4.load(sys.argv[1], name) for name in ('gate_up_proj', 'down_proj')]\n"
        "weights = moe_ref.MoEWeights(*packed, config=moe_ref.MoEConfig(2))\n"
        "given = safetensors.torch.load_file(sys.argv[1])\n"
        "y = executors.get('grouped_nf4')(given['x'], given['router_logits'], weights)\n"
        "print(hashlib.sha256(y.view(torch.int16).numpy().tobytes()).hexdigest())\n"
    )
    ran = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    y = executors.get("grouped_nf4")(given["x"], given["router_logits"], weights)
    assert ran.stdout.strip() == sha256(y.view(torch.int16).numpy().tobytes()).hexdigest()


def part(entries: State, name: str) -> State:
    return {key: value for key, value in sorted(entries.items()) if key == name or key.startswith(f"{name}.")}


def test_a_file_says_what_is_transposed(tmp_path: Path) -> None:
    path = tmp_path / "layer.safetensors"
    square = nf4.quantize_tensor(random(2, 64, 64).mT)
    nf4.save(path, {"a": square, "b": square.transpose(1, 2)})
    same(nf4.load(path, "a"), square)
    same(nf4.load(path, "a", transposed=True), square)
    same(nf4.load(path, "b"), square.transpose(1, 2))
    same(nf4.load(path, "b", transposed=True), square)
    with pytest.raises(
        ValueError, match=r"transposed=False: must be True or None, since the file lists a as transposed$"
    ):
        nf4.load(path, "a", transposed=False)


def test_files_of_others(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(older(), path)
    same(nf4.load(path, OLDER), nf4.from_state_dict(older(), OLDER))
    same(nf4.load(str(path), OLDER, transposed=True), nf4.from_state_dict(older(), OLDER, transposed=True))


def test_tensors_that_share_memory_are_saved(tmp_path: Path) -> None:
    path = tmp_path / "layer.safetensors"
    tensor = small(4, 8, 8, nested=True)
    nf4.save(path, {"a": tensor, "b": tensor, "c": tensor.absmax, "d": random(4, 4).T})
    same(nf4.load(path, "b"), tensor)
    assert load_file(path)["d"].equal(random(4, 4).T)


@pytest.mark.parametrize("step", ["executors._files.tensors.save_file", "os.replace"])
def test_saving_is_whole_or_not_at_all(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "layer.safetensors"
    nf4.save(path, {"a": PLAIN})
    before = path.read_bytes()

    def fails(*arguments: Any) -> None:
        if step != "os.replace":
            arguments[1].write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(step, fails)
    with pytest.raises(KeyboardInterrupt):
        nf4.save(path, {"a": WITH_NESTED})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    path = tmp_path / "layer.safetensors"
    with pytest.raises(
        ValueError, match=r"^tensors\['a.absmax'\] has an entry 'a.absmax': must not be that of another"
    ):
        nf4.save(path, {"a": PLAIN, "a.absmax": torch.ones(1)})
    with pytest.raises(TypeError, match=r"^tensors\['a'\]=7: must be an NF4Tensor or a torch.Tensor$"):
        nf4.save(path, {"a": 7})
    with pytest.raises(OSError, match="none") as caught:
        nf4.save(tmp_path / "none" / "x", {"a": PLAIN})
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def cut(by: int) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[:by]) and None


def noted(value: str) -> Callable[[Path], None]:
    return lambda path: save_file(nf4.to_state_dict(PLAIN, "a"), path, {"transposed": value})


FILES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "the end missing": ("must be a safetensors file, but ", cut(-1)),
    "the header cut": ("must be a safetensors file, but ", cut(40)),
    "empty": ("must be a safetensors file, but ", cut(0)),
    "text": ("must be a safetensors file, but ", lambda path: path.write_text("hello, world" * 9)),
    "a pickle": ("must be a safetensors file, but ", lambda path: torch.save({"a": torch.ones(3)}, path)),
    "other tensors": ("'a' is missing: must be there", lambda path: save_file({"b": torch.ones(3)}, path)),
    "a dense tensor": ("a is not in 4 bits: must have one of", lambda path: save_file({"a": torch.ones(3)}, path)),
    "a note that is no JSON": ("metadata transposed='a': must be a JSON list of names", noted("a")),
    "a note that is no list": ("metadata transposed='[1]': must be a JSON list of names", noted("[1]")),
}


@pytest.mark.parametrize("what", FILES)
def test_files_that_are_refused(what: str, tmp_path: Path) -> None:
    path = tmp_path / "layer.safetensors"
    nf4.save(path, {"a": PLAIN})
    message, spoil = FILES[what]
    spoil(path)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        nf4.load(path, "a")
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["none", "."])
def test_a_file_that_is_not_there(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r": must be a file that exists$"):
        nf4.load(tmp_path / name, "a")


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there(device: str, tmp_path: Path) -> None:
    path = tmp_path / "layer.safetensors"
    nf4.save(path, {"a": PLAIN})
    with pytest.raises(ValueError, match=rf"^device={device}: must be one that torch has here: "):
        nf4.load(path, "a", device=device)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"path": 3}, TypeError, "path=3: must be text or a path"),
        ({"device": "meta"}, ValueError, "device=meta: must be one that has memory"),
        ({"device": 3.5}, TypeError, "device=3.5: must be a torch.device, or its name"),
        ({"verify": "no"}, TypeError, "verify='no': must be True or False"),
    ],
)
def test_wrong_arguments_of_readers(
    given: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    nf4.save(path, {"a": PLAIN})
    for read, right in ((nf4.load, {"path": path, "name": "a"}), (load_layer, {"path": bundled_layer()})):
        with pytest.raises(error) as caught:
            read(**{**right, **given})
        assert str(caught.value) == message


def test_wrong_arguments_of_writers(tmp_path: Path) -> None:
    layer = load_layer(bundled_layer())
    parts: Any = (layer.x, layer.router_logits, layer.weights)
    with pytest.raises(TypeError, match=r"^path=3: must be text or a path$"):
        nf4.save(3, {"a": PLAIN})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^path=3: must be text or a path$"):
        save_layer(3, *parts)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^b is on the meta device: must have numbers$"):
        nf4.save(tmp_path / "a", {"a": PLAIN, "b": torch.empty(3, device="meta")})
    with pytest.raises(TypeError, match=r"^source=3: must be text$"):
        save_layer(tmp_path / "a", *parts, source=3)
    assert not list(tmp_path.iterdir())


def test_a_whole_layer_is_no_dict() -> None:
    weights = MoEWeights(PLAIN, PLAIN, config=MoEConfig(1))
    with pytest.raises(
        TypeError, match=r"^tensors is a MoEWeights: must be a dict .*; weights.packed\(\) has its 4-bit"
    ):
        nf4.save("nowhere", weights)
