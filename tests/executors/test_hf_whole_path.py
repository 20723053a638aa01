"""Five families go the whole way: 4 bits, adapters, training, a stop, files, another model, generation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("peft", reason="the extra moe-ref[qlora]")
pytest.importorskip("bitsandbytes", reason="the extra moe-ref[qlora]")
from peft import PeftModel, get_peft_model

import peft_models
from executors import hf

pytestmark = peft_models.MARKS
TEXT = peft_models.ids(12)


def adapted(base: Any) -> Any:
    torch.manual_seed(0)
    with hf.peft(base):
        model = get_peft_model(base, peft_models.lora_config())
    hf.use(model, "auto")
    return model.train()


def trained(model: Any, optimiser: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        logits = model(input_ids=TEXT[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), TEXT[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def optimiser_of(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=0.05)


@pytest.mark.parametrize("name", peft_models.NAMES)
def test_the_whole_way(name: str, tmp_path: Path) -> None:
    """What is written and read back goes on as if nothing had stopped it, and writes the same tokens."""
    base = peft_models.base(name, torch.float32)
    hf.quantize_experts(base)
    hf.save_quantized(base, tmp_path / "base")
    model = adapted(base)
    optimiser = optimiser_of(model)
    losses = trained(model, optimiser, 3)
    model.save_pretrained(str(tmp_path / "adapter"))
    torch.save(optimiser.state_dict(), tmp_path / "optimiser")
    losses += trained(model, optimiser, 5)
    assert losses[-1] < losses[0] - 0.05

    again: Any = hf.load_quantized(tmp_path / "base")
    again.set_attn_implementation(base.config._attn_implementation)  # no file keeps it, and losses are to be the same
    with hf.peft(again):
        again = PeftModel.from_pretrained(again, str(tmp_path / "adapter"), is_trainable=True)
    hf.use(again, "auto")
    resumed = optimiser_of(again.train())
    resumed.load_state_dict(torch.load(tmp_path / "optimiser", weights_only=True))
    assert trained(again, resumed, 5) == losses[3:]

    written = [
        one.eval().generate(input_ids=TEXT[:1, :4], max_new_tokens=4, do_sample=False, pad_token_id=0)
        for one in (model, again)
    ]
    assert torch.equal(*written)
    assert written[0].shape == (1, 8)


@pytest.mark.filterwarnings("ignore::Warning")  # of datasets and trl, whichever version is there
@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_moe"])
def test_trl_trains(name: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is in no extra")
    datasets = pytest.importorskip("datasets")
    base = peft_models.base(name, torch.float32)
    hf.quantize_experts(base)
    model = adapted(base)
    rows = datasets.IterableDataset.from_generator(
        lambda: ({"input_ids": row, "labels": row} for row in TEXT.repeat(16, 1).tolist())
    )
    arguments = trl.SFTConfig(
        str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=8,
        learning_rate=0.05,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        dataloader_pin_memory=False,
        bf16=False,
        gradient_checkpointing=False,
    )

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        found = {key: torch.tensor([row[key] for row in batch]) for key in ("input_ids", "labels")}
        return found | {"attention_mask": torch.ones_like(found["labels"])}

    trainer = trl.SFTTrainer(
        model, arguments, train_dataset=rows, data_collator=collate, processing_class=tokenizer(tmp_path)
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.05


def tokenizer(folder: Path) -> Any:
    """One that is never used: SFTTrainer asks for it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=own, pad_token="<pad>", eos_token="<eos>")
