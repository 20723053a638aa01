"""`executors.hf.save_quantized` and `load_quantized`: the same bytes and logits in a new process, whole or refused."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="the extra moe-ref[qlora]")
pytest.importorskip("bitsandbytes", reason="the extra moe-ref[qlora]")
pytest.importorskip("peft", reason="the extra moe-ref[qlora]")

import peft
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, GenerationConfig, MixtralConfig, MixtralForCausalLM

import executors.hf
import families
from executors._files.whole import locked
from executors.checkpoint import BadCheckpoint
from executors.hf import load_quantized, quantize_experts, save, save_quantized
from family_errors import inputs
from packed_models import Alive, build, counted
from tiny_models import edit_config

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h")
CHILD = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file
import executors.hf

torch.set_num_threads(1)
for folder in map(Path, sys.argv[1:]):
    model = executors.hf.load_quantized(folder)
    model.set_attn_implementation("eager")
    executors.hf.use(model, "auto")
    expected = load_file(folder.with_suffix(".expected"))
    ids, logits = expected.pop("ids"), expected.pop("logits")
    state = model.state_dict()
    assert state.keys() == expected.keys(), folder
    for key, value in expected.items():
        assert state[key].dtype == value.dtype and torch.equal(state[key], value), (folder, key)
    with torch.no_grad():
        assert torch.equal(model(ids)[0], logits), folder
    assert type(model).__module__.startswith("transformers.models."), type(model)
    print(folder.name)
"""


def packed(name: str, **form: Any) -> Any:
    model = build(name)
    quantize_experts(model, **form)
    return model


def same_state(model: nn.Module, other: nn.Module) -> None:
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert (state[key].dtype, state[key].device) == (value.dtype, value.device), key
        assert torch.equal(state[key], value), key


def expect(model: Any, folder: Path) -> None:
    """Writes what another process must find."""
    executors.hf.use(model, "auto")
    ids = inputs(model)["input_ids"]
    with torch.no_grad():
        logits = model(ids)[0]
    state = {key: value.clone().contiguous() for key, value in model.state_dict().items()}
    save_file({**state, "ids": ids, "logits": logits}, folder.with_suffix(".expected"))


def in_a_new_process(folders: list[Path]) -> None:
    command = [sys.executable, "-c", CHILD, *map(str, folders)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.split() == [folder.name for folder in folders]


def test_the_same_in_a_new_process(tmp_path: Path) -> None:
    folders = []
    for name in NAMES:
        model = packed(name, nested=name != "qwen3_moe", quant_type="fp4" if name == "gpt_oss" else "nf4")
        folders.append(save_quantized(model, tmp_path / name, shard_bytes=20_000))
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 2
        expect(model, folders[-1])
    in_a_new_process(folders)


@pytest.mark.nightly
def test_every_family_in_a_new_process(tmp_path: Path) -> None:
    folders = []
    for family in families.families():
        model = families.build(family)
        try:
            quantize_experts(model)
        except executors.Unsupported:
            continue
        if inputs(model).keys() == {"input_ids"}:
            folders.append(save_quantized(model, tmp_path / str(family)))
            expect(model, folders[-1])
    assert len(folders) > 40
    in_a_new_process(folders)


def test_nothing_is_dense_on_the_way(tmp_path: Path) -> None:
    """Neither saving nor loading decodes a stack, and loading takes no memory beside the model."""
    model = packed("mixtral")
    with counted() as stacks:
        folder = save_quantized(model, tmp_path / "model")
        size = sum(value.nbytes for value in model.state_dict().values())
        with Alive([]) as alive:
            loaded = load_quantized(folder)
    assert stacks == []
    assert alive.peak < size + 8_000  # tables, and one tensor's codes
    same_state(loaded, model)
    assert not loaded.training


def mixtral(hidden: int = 32, layers: int = 2, **changes: Any) -> Any:
    sizes = {"hidden_size": hidden, "intermediate_size": 16, "num_hidden_layers": layers, "num_local_experts": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads, **changes)).eval()


def mixed() -> Any:
    """In bf16, some of it in fp32, with embeddings that are tied."""
    model = mixtral(tie_word_embeddings=True).bfloat16()
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.float()
    quantize_experts(model)
    return model


def test_dtypes_ties_and_generation(tmp_path: Path) -> None:
    model = mixed()
    model.generation_config = GenerationConfig(max_new_tokens=7, pad_token_id=3)
    loaded = load_quantized(save_quantized(model, tmp_path / "model"))
    same_state(loaded, model)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16, torch.float32, torch.uint8}
    assert (loaded.generation_config.max_new_tokens, loaded.generation_config.pad_token_id) == (7, 3)
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == wanted
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert "lm_head.weight" not in index["weight_map"]


def test_linear_layers_in_4_bits(tmp_path: Path) -> None:
    """As transformers' load_in_4bit leaves a model, with its experts quantised after."""
    mixtral(hidden=64).bfloat16().save_pretrained(tmp_path / "dense")
    given = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
    model = MixtralForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=given, dtype=torch.bfloat16)
    quantize_experts(model)
    loaded = load_quantized(save_quantized(model, tmp_path / "model"))
    same_state(loaded, model)
    kinds = [type(module) for module in model.modules() if type(module).__name__ == "Linear4bit"]
    assert kinds
    assert [type(module) for module in loaded.modules() if type(module).__name__ == "Linear4bit"] == kinds
    assert loaded.is_loaded_in_4bit
    for each in (model, loaded):
        executors.hf.use(each)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids)[0], model(ids)[0])
    again = load_quantized(save_quantized(model, tmp_path / "again"))  # a CPU has rounded statistics by now
    executors.hf.use(again)
    with torch.no_grad():
        assert torch.equal(again(ids)[0], model(ids)[0])


def test_a_save_that_stops_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, written = packed("mixtral"), []
    true = save.write

    def stops(path: Path, *rest: Any) -> None:
        if len(written) == 2:
            raise OSError("no space left")
        written.append(path.name)
        true(path, *rest)

    monkeypatch.setattr(save, "write", stops)
    with pytest.raises(OSError, match="no space left"):
        save_quantized(model, tmp_path / "model", shard_bytes=20_000)
    assert not (tmp_path / "model").exists()
    partial = tmp_path / ".model.partial"
    assert {file.name for file in partial.glob("*.safetensors")} == set(written)
    changed = load_file(partial / written[0])
    save_file({key: torch.zeros_like(value) for key, value in changed.items()}, partial / written[0])
    killed = f".{written[1]}.1.tmp"
    (partial / killed).write_bytes(b"half a file")
    again: list[str] = []
    monkeypatch.setattr(save, "write", lambda path, *rest: again.append(path.name) or true(path, *rest))
    save_quantized(model, tmp_path / "model", shard_bytes=20_000)
    assert written[0] in again  # which is not this model's
    assert written[1] not in again
    assert not partial.exists()
    assert not (tmp_path / "model" / killed).exists()
    same_state(load_quantized(tmp_path / "model"), model)


def test_what_is_shared_against_the_configuration(tmp_path: Path) -> None:
    """A head, and a whole experts module: one copy is written, and each place gets its own."""
    model = mixtral()
    model.lm_head.weight = model.model.embed_tokens.weight
    model.model.layers[1].mlp.experts = model.model.layers[0].mlp.experts
    quantize_experts(model)
    loaded = load_quantized(save_quantized(model, tmp_path / "model"))
    same_state(loaded, model)
    keys = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())["weight_map"]
    assert "lm_head.weight" not in keys
    assert "model.layers.1.mlp.experts.gate_up_proj" not in keys


def test_a_link_stays_one(tmp_path: Path) -> None:
    """To an empty folder, and to one that is not there yet."""
    model = packed("mixtral")
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new"):
        link = tmp_path / f"link to {name}"
        link.symlink_to(tmp_path / name)
        assert save_quantized(model, link) == link
        assert link.is_symlink()
        same_state(load_quantized(tmp_path / name), model)


def test_progress(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    model = packed("mixtral")
    folder = save_quantized(model, tmp_path / "m", shard_bytes=20_000, progress=lambda *both: told.append(both))
    total = sum(value.nbytes for value in model.state_dict().values())
    assert (told[0], told[-1]) == ((0, total), (total, total))
    told.clear()
    load_quantized(folder, progress=lambda *both: told.append(both))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    count = len(index["weight_map"])
    assert told == [(done, count) for done in range(count + 1)]


FIRST = "model.layers.0.mlp.experts.gate_up_proj"


def edit(folder: Path, key: str, change: Callable[[dict[str, torch.Tensor], str], object]) -> None:
    """Changes the file that holds a key, and the index with it."""
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    file = values["weight_map"][key]
    state = load_file(folder / file)
    change(state, key)
    save_file(state, folder / file, {"format": "pt"})
    values["weight_map"] = {k: f for k, f in values["weight_map"].items() if f != file} | dict.fromkeys(state, file)
    index.write_text(json.dumps(values))


def cut(folder: Path) -> None:
    file = min(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])


NORM = "model.norm.weight"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda f: edit(f, NORM, lambda s, k: s.pop(k)), f"{NORM} is missing: must be there, for a Mixtral"),
    "field": (lambda f: edit(f, f"{FIRST}.quant_map", lambda s, k: s.pop(k)), f"'{FIRST}.quant_map' is missing"),
    "stack": (lambda f: edit(f, FIRST, lambda s, k: s.pop(k)), f"'{FIRST}' is missing: must be there"),
    "too many": (lambda f: edit(f, NORM, lambda s, _: s.update(x=torch.ones(2))), "x is unknown: must be a tensor of"),
    "shape": (
        lambda f: edit(f, NORM, lambda s, k: s.update({k: torch.ones(31)})),
        f"{NORM} is float32 (31,): must be float32 (32,), as config.json has it",
    ),
    "dtype": (
        lambda f: edit(f, NORM, lambda s, k: s.update({k: s[k].int()})),
        f"{NORM} is int32 (32,): must be float32 (32,), as config.json has it",
    ),
    "bytes": (lambda f: edit(f, FIRST, lambda s, k: s.update({k: s[k][:-1]})), f"{FIRST} has 2047 bytes: must be 2048"),
    "absmax": (
        lambda f: edit(f, f"{FIRST}.nested_absmax", lambda s, k: s.update({k: s[k] * torch.nan})),
        f"{FIRST}.nested_absmax has NaN or infinite elements: must be finite",
    ),
    "other sizes": (
        lambda f: edit_config(f, lambda values: values.update(num_local_experts=3)),
        f"{FIRST} has shape (4, 32, 32): must be (3, 32, 32), as config.json has it",
    ),
    "not in 4 bits": (
        lambda f: edit(f, NORM, lambda s, k: s.update({f"{k}.absmax": torch.ones(1)})),
        f"{NORM} is in 4 bits: must be dense in a MixtralRMSNorm",
    ),
    "cut": (cut, "must be a safetensors file, but"),
    "gone": (lambda f: min(f.glob("*.safetensors")).unlink(), "must be a file that exists"),
    "class": (
        lambda f: edit_config(f, lambda values: values.update(architectures=["Nothing"])),
        "architectures=['Nothing']: must name a class of transformers",
    ),
    "no model": (
        lambda f: edit_config(f, lambda values: values.update(architectures=[7, "pipeline", "GptOssForCausalLM"])),
        "architectures=[7, 'pipeline', 'GptOssForCausalLM']: must name a class of transformers",
    ),
    "config": (lambda f: (f / "config.json").unlink(), "must have a config.json of a known model"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = mixtral(layers=1)
    quantize_experts(model)
    return save_quantized(model, tmp_path_factory.mktemp("saved") / "model")


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_refused_by_key(case: str, saved: Path, tmp_path: Path) -> None:
    change, said = BROKEN[case]
    folder = tmp_path / "model"
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    change(folder)
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        load_quantized(folder, verify=False)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert case in ("class", "no model", "config") or isinstance(caught.value, BadCheckpoint)


def swap_a_shard(folder: Path) -> None:
    """One file of another save of the same model class: the same keys, dtypes and shapes."""
    model = mixtral(layers=1)
    quantize_experts(model)
    other = save_quantized(model, folder.with_name("other"))
    name = min(file.name for file in other.glob("*.safetensors"))
    (folder / name).write_bytes((other / name).read_bytes())


def edit_index(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"total_size"', '"total_sizf"'))


CHANGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "two saves": (swap_a_shard, ".safetensors has checksum "),
    "config": (lambda f: edit_config(f, lambda v: v.update(num_experts_per_tok=1)), "config.json has checksum "),
    "index": (edit_index, "model.safetensors.index.json has checksum "),
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_folder_that_was_changed_is_refused_but_on_demand(case: str, saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "model")
    change, said = CHANGED[case]
    change(folder)
    with pytest.raises(BadCheckpoint, match=said + ".*; verify=False does not compare$"):
        load_quantized(folder)
    load_quantized(folder, verify=False)


def test_a_folder_without_checksums_is_read(saved: Path, tmp_path: Path) -> None:
    """Of an earlier version."""
    folder = shutil.copytree(saved, tmp_path / "model")
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    del values["metadata"]["checksums"]
    index.write_text(json.dumps(values))
    for file in folder.glob("*.safetensors"):
        save_file(load_file(file), file, {"format": "pt"})
    same_state(load_quantized(folder), load_quantized(saved))


def test_another_process_that_saves_there_is_refused(tmp_path: Path) -> None:
    with locked(tmp_path / "model"), pytest.raises(BlockingIOError, match="must not be written by another process"):
        save_quantized(packed("mixtral"), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # of PEFT with transformers
def test_arguments_are_refused_in_one_line(saved: Path, tmp_path: Path) -> None:
    dense, model = build("mixtral"), packed("mixtral")
    adapted = peft.get_peft_model(packed("mixtral"), peft.LoraConfig(target_modules=["q_proj"]))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    cases: list[tuple[Callable[[], object], type[Exception], str]] = [
        (
            lambda: save_quantized(dense, tmp_path / "x"),
            executors.Unsupported,
            "no experts are in 4 bits: must have been",
        ),
        (
            lambda: save_quantized(nn.Linear(2, 2), tmp_path / "x"),
            TypeError,
            "model is a Linear: must be a transformers",
        ),
        (lambda: save_quantized(model, tmp_path / "full"), FileExistsError, "must not exist, or be an empty folder"),
        (lambda: save_quantized(model, tmp_path / "x", shard_bytes=0), ValueError, "shard_bytes=0: must be an integer"),
        (lambda: save_quantized(model, None), TypeError, "folder=None: must be text or a path"),  # type: ignore[arg-type]
        (lambda: save_quantized(model.to("meta"), tmp_path / "x"), executors.Unsupported, "is on the meta device"),
        (lambda: save_quantized(adapted, tmp_path / "x"), TypeError, "model is a PeftModel"),
        (
            lambda: save_quantized(adapted.get_base_model(), tmp_path / "x"),
            TypeError,
            "of an adapter of PEFT: must have",
        ),
        (
            lambda: load_quantized(saved, device="nowhere"),
            ValueError,
            "device=nowhere: must be one that torch has",
        ),
        (lambda: load_quantized(saved, device="meta"), ValueError, "device=meta: must be one that has memory"),
        (lambda: load_quantized(saved, "nf4"), ValueError, "quant_type='nf4': must be None"),
        (lambda: load_quantized(saved, "int4"), ValueError, "quant_type='int4': must be one of"),  # type: ignore[arg-type]
        (lambda: load_quantized(7), TypeError, "folder=7: must be text or a path"),  # type: ignore[arg-type]
        (lambda: load_quantized(tmp_path / "nothing"), ValueError, "nothing: must be a folder that exists"),
    ]
    for call, kind, said in cases:
        with pytest.raises(kind, match=re.escape(said)) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "x").exists()
