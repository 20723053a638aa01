"""`executors.hf.export_adapter`: what it writes is read by hand, and is what PEFT merges, expert by expert."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

pytest.importorskip("peft", reason="the extra moe-ref[qlora]")

from peft import PeftModel

import executors.hf
import packed_models
import peft_models
from executors.hf import export_adapter
from peft_models import NAMES, adapted, base, close, experts_in, lora_config, switched

pytestmark = [  # PEFT looks for such keys among modules alone: it uses those of parameters, and says that it does not
    *peft_models.MARKS,
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]
each = pytest.mark.parametrize("name", NAMES)
NAMED = {  # expert 3 of the first layer that has experts: its up projection (or gate and up), and down
    "gpt_oss": (
        "layers.0.mlp.experts.3.gate_proj",
        "layers.0.mlp.experts.3.up_proj",
        "layers.0.mlp.experts.3.down_proj",
    ),
    "qwen3_moe": (
        *("layers.0.mlp.experts.3.gate_proj", "layers.0.mlp.experts.3.up_proj"),
        "layers.0.mlp.experts.3.down_proj",
    ),
    "mixtral": (
        *("layers.0.block_sparse_moe.experts.3.w1", "layers.0.block_sparse_moe.experts.3.w3"),
        "layers.0.block_sparse_moe.experts.3.w2",
    ),
    "deepseek_v3": (
        *("layers.0.mlp.experts.3.gate_proj", "layers.0.mlp.experts.3.up_proj"),
        "layers.0.mlp.experts.3.down_proj",
    ),
    "nemotron_h": ("layers.1.mixer.experts.3.up_proj", "layers.1.mixer.experts.3.down_proj"),
}


def deltas(folder: Path) -> dict[str, Tensor]:
    """A reader by hand: what each module of a file gains, in float64."""
    config, tensors = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    found = {}
    for key, a in tensors.items():
        name, factor, end = key.rsplit(".", 2)
        assert end == "weight"
        if factor == "lora_A":
            assert a.shape[0] == config["r"]
            found[name] = scaling * tensors[f"{name}.lora_B.weight"].double() @ a.double()
    assert 2 * len(found) == len(tensors)
    assert {name.rsplit(".", 1)[1] for name in found} == set(config["target_modules"])
    assert config["target_parameters"] is None
    return found


def merged(name: str, **changes: Any) -> list[tuple[nn.Module, nn.Module]]:
    """Each experts module, as plain PEFT merges it, and as it was."""
    whole = adapted(name, **changes).merge_and_unload()
    return list(zip(experts_in(whole), experts_in(base(name)), strict=True))


def gained(pair: tuple[Any, Any], name: str) -> Tensor:
    """[E, out, in] What a parameter gains."""
    delta = getattr(pair[0], name).detach() - getattr(pair[1], name).detach()
    return delta.transpose(1, 2) if pair[1].is_transposed else delta


def halves(pair: tuple[Any, Any], delta: Tensor) -> list[Tensor]:
    """Rows of gate and rows of up."""
    if not pair[1].is_concatenated:
        return [delta[:, 0::2], delta[:, 1::2]]
    return list(delta.split(delta.shape[1] // 2, 1))


@each
@pytest.mark.parametrize("changes", [{}, {"use_rslora": True, "lora_alpha": 2}], ids=["lora", "rslora"])
def test_each_expert_gains_what_peft_merges(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = switched(adapted(name, **changes))
    assert export_adapter(model, tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    found = deltas(tmp_path / "new" / "folder")
    pairs, root = (
        merged(name, **changes),
        "base_model.model.backbone." if name == "nemotron_h" else "base_model.model.model.",
    )
    seen = 0
    for layer, pair in enumerate(pairs):
        wanted = [gained(pair, "up_proj")] if name == "nemotron_h" else halves(pair, gained(pair, "gate_up_proj"))
        for example, delta in zip(NAMED[name], [*wanted, gained(pair, "down_proj")], strict=True):
            for expert in range(len(delta)):
                own = example.replace("experts.3", f"experts.{expert}").replace("layers.0", f"layers.{layer}")
                torch.testing.assert_close(found[root + own], delta[expert], rtol=1e-10, atol=1e-12)
                seen += 1
    assert seen == len(found)
    assert {each.name for each in (tmp_path / "new" / "folder").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_peft_reads_it_back(name: str, tmp_path: Path) -> None:
    """PEFT itself takes this form for these families, as adapters of transformers 4 have it."""
    model = switched(adapted(name, target_modules=["q_proj"]))
    export_adapter(model, tmp_path)
    again = PeftModel.from_pretrained(base(name), tmp_path)
    assert close(peft_models.logits(again), peft_models.logits(model))


def test_other_modules_and_other_adapters(tmp_path: Path) -> None:
    """Attention is written beside; of several adapters the one that is named; a plain PEFT model, in bf16."""
    model = adapted("qwen3_moe", torch.bfloat16, target_modules=["q_proj"])
    model.add_adapter("other", lora_config(r=2, target_modules=["v_proj"]), autocast_adapter_dtype=False)
    peft_models.fill(model)
    export_adapter(model, tmp_path, adapter="other")
    found = load_file(tmp_path / "adapter_model.safetensors")
    kinds = {key.removeprefix("base_model.model.model.layers.").split(".")[1] for key in found}
    assert kinds == {"self_attn", "mlp"}
    assert not [key for key in found if "q_proj" in key]
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    own = model.base_model.model.model.layers[1].self_attn.v_proj
    prefix = "base_model.model.model.layers.1.self_attn.v_proj"
    assert torch.equal(found[f"{prefix}.lora_A.weight"], own.lora_A["other"].weight)
    assert torch.equal(found[f"{prefix}.lora_B.weight"], own.lora_B["other"].weight)


def test_experts_in_4_bits(tmp_path: Path) -> None:
    """The same file, and no stack is decoded."""
    from peft import get_peft_model

    model = packed_models.build("gpt_oss", "nested")
    with executors.hf.peft(model):
        ours = get_peft_model(model, lora_config())
    peft_models.fill(ours)
    with packed_models.counted() as stacks:
        executors.hf.use(ours, "grouped_nf4")
        export_adapter(ours, tmp_path / "packed")
    assert stacks == []
    export_adapter(adapted("gpt_oss", torch.float32), tmp_path / "dense")
    one, other = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("packed", "dense"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_adapter(adapted("mixtral"), tmp_path)
    before = {each.name: each.read_bytes() for each in tmp_path.iterdir()}

    def broken(tensors: object, path: Path, *_: object) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("executors._files.tensors.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        export_adapter(adapted("mixtral", r=1), tmp_path)
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == before


def test_no_settings_stand_beside_the_tensors_of_another_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two files cannot be replaced at once: in between there are no settings, which every reader refuses."""
    export_adapter(adapted("mixtral"), tmp_path)
    replace = os.replace

    def killed(source: Path, target: Path) -> None:
        if Path(target).name == "adapter_config.json":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        export_adapter(adapted("mixtral", r=1), tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["adapter_model.safetensors"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target_parameters": None, "target_modules": ["q_proj"]}, "adapter='default': must have experts: "),
        ({"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 1}}, "rank 1 and scaling 5: must be 3 and 1.66667"),
        ({"alpha_pattern": {"experts.down_proj": 9}}, "rank 3 and scaling 3: must be 3 and 1.66667, as r and"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]: must be None: serving engines refuse it"),
        ({"target_modules": ["q_proj"], "bias": "lora_only"}, "bias='lora_only': must be 'none': serving engines"),
        ({"target_parameters": [*peft_models.TARGETS, "gate.weight"]}, "gate.weight has an adapter: must be a param"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens.lora_embedding_A: must have lora_A.weight and lora_B"),
    ],
)
def test_what_the_form_cannot_say_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    model = adapted("qwen3_moe", **changes)
    with pytest.raises(executors.Unsupported, match=said) as caught:
        export_adapter(model, tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"form": "3d"}, "^form='3d': must be 'per_expert'; model.save_pretrained writes PEFT's own form$"),
        ({"adapter": "none"}, "^adapter='none': must be one of 'default'$"),
        ({"adapter": ["default"]}, r"^adapter=\['default'\]: must be the name of one$"),
        ({"folder": None}, "^folder=None: must be text or a path$"),
        ({"model": nn.Linear(1, 1)}, "^model is a Linear: must be a PeftModel$"),
    ],
)
def test_refusals(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        export_adapter(**{"model": adapted("mixtral"), "folder": tmp_path} | given)
