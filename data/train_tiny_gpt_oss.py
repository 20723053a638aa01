"""Train a small gpt-oss model on Python's own documentation and keep one of its MoE layers.

The text is the ``topics`` dictionary of the standard library's ``pydoc_data.topics``, so nothing has to be
downloaded. The model is a byte-level language model of the gpt-oss architecture with random initial weights.
After training, the input and the router logits of one MoE layer are captured on held-out text and written,
together with the layer's weights, to a safetensors file. A second file holds the rest of the model, so that training
can go on (``examples/train_tiny.py``). ``data/README.md`` documents both files.

Needs: moe-ref, torch, transformers, safetensors, numpy, matplotlib, typer, rich.
"""

import hashlib
import io
import json
import math
import platform
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any, Literal

import matplotlib
import torch
import transformers
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F
from transformers import GptOssConfig, GptOssForCausalLM

import moe_ref.nf4
from executors import nf4
from executors._cli.options import with_options
from executors._files.whole import replacing
from moe_ref.types import NF4Tensor

FORMAT = "moe-ref layer 1"
LAYER_NAME = "tiny_gpt_oss_layer"
REST_NAME = "tiny_gpt_oss_rest"
LOSS_NAME = "tiny_gpt_oss_loss"
VOCABULARY = 256
HELD_OUT_FRACTION = 0.1
LOG_EVERY = 10
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Arguments:
    """All arguments of a run; all but the folder are recorded in the JSON report."""

    output: Annotated[Path, typer.Option(help="Folder to write the four files to.", file_okay=False)] = HERE
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps. A few are enough for a smoke test.")] = 1000
    batch_size: Annotated[int, typer.Option(min=1, help="Windows of text per step.")] = 8
    context: Annotated[int, typer.Option(min=2, max=4096, help="Bytes per window.")] = 256
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Highest learning rate.")] = 2e-3
    warmup_steps: Annotated[int, typer.Option(min=0, help="Steps of linear warm-up.")] = 50
    weight_decay: Annotated[float, typer.Option(min=0.0, help="AdamW weight decay of the matrices.")] = 0.1
    gradient_clip: Annotated[float, typer.Option(min=0.0, help="Largest norm of the gradient.")] = 1.0
    balance_coefficient: Annotated[
        float, typer.Option(min=0.0, help="Factor of the loss that evens out the routing; 0 leaves it out.")
    ] = 0.01
    layers: Annotated[int, typer.Option(min=1, help="Transformer layers.")] = 3
    hidden_size: Annotated[int, typer.Option(min=1, help="Width of the hidden states, H.")] = 160
    intermediate_size: Annotated[int, typer.Option(min=1, help="Width inside an expert, I.")] = 128
    experts: Annotated[int, typer.Option(min=2, help="Experts per layer, E.")] = 32
    top_k: Annotated[int, typer.Option(min=1, help="Experts per token.")] = 4
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 5
    key_value_heads: Annotated[int, typer.Option(min=1, help="Key and value heads.")] = 1
    head_dim: Annotated[int, typer.Option(min=2, help="Width of a head.")] = 32
    kept_layer: Annotated[int, typer.Option(min=0, help="Layer to keep, counted from 0.")] = 1
    kept_tokens: Annotated[int, typer.Option(min=1, help="Held-out tokens to keep.")] = 1024
    evaluate_every: Annotated[int, typer.Option(min=1, help="Steps between validation losses.")] = 100
    experts_implementation: Annotated[
        Literal["eager", "grouped_mm"], typer.Option(help="How transformers computes the experts.")
    ] = "grouped_mm"
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of PyTorch.")] = 1
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the batches.")] = 0


@dataclass
class LossCurve:
    """Losses in nats per byte, each with the number of optimiser steps done when it was taken."""

    train: list[tuple[int, float]]
    validation: list[tuple[int, float]]


@dataclass(frozen=True)
class Capture:
    """What one MoE layer saw and computed, in fp32, over a run of tokens."""

    x: Tensor
    router_logits: Tensor
    top_experts: Tensor
    output: Tensor


def read_text() -> bytes:
    """Return the documentation topics, joined in the order of their sorted keys, as UTF-8."""
    return "".join(topics[key] for key in sorted(topics)).encode("utf-8")


def split_text(text: bytes) -> tuple[Tensor, Tensor]:
    """Return the training bytes and the held-out bytes (the last tenth of the text) as integer tensors."""
    values = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    held_out = int(len(values) * HELD_OUT_FRACTION)
    return values[:-held_out], values[-held_out:]


def build_model(args: Arguments) -> GptOssForCausalLM:
    """Return a gpt-oss model with random fp32 weights."""
    config = GptOssConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=args.layers,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_local_experts=args.experts,
        num_experts_per_tok=args.top_k,
        num_attention_heads=args.heads,
        num_key_value_heads=args.key_value_heads,
        head_dim=args.head_dim,
        max_position_embeddings=args.context,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        swiglu_alpha=1.702,
        swiglu_limit=7.0,
        router_aux_loss_coef=args.balance_coefficient,
        output_router_logits=False,
        use_cache=False,
    )
    return GptOssForCausalLM._from_config(
        config,
        attn_implementation="eager",
        experts_implementation=args.experts_implementation,
        dtype=torch.float32,
    )


def windows(values: Tensor, context: int) -> Tensor:
    """Cut the values into windows of context + 1 bytes; each begins with the last byte of the one before."""
    return values.unfold(0, context + 1, context)


def sample_batch(values: Tensor, args: Arguments, generator: torch.Generator) -> Tensor:
    """Return a batch of windows of context + 1 bytes that begin at random places."""
    starts = torch.randint(len(values) - args.context, (args.batch_size, 1), generator=generator)
    return values[starts + torch.arange(args.context + 1)]


def losses(model: GptOssForCausalLM, batch: Tensor, balance_coefficient: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the loss to minimise and the cross entropy in it.

    The cross entropy is the mean, in nats per byte, over every byte of the batch but the first of each row.
    """
    result = model(input_ids=batch[:, :-1], output_router_logits=balance_coefficient > 0)
    entropy = F.cross_entropy(result.logits.flatten(0, 1), batch[:, 1:].flatten())
    if balance_coefficient > 0:
        return entropy + balance_coefficient * result.aux_loss, entropy
    return entropy, entropy


@torch.no_grad()
def evaluate(model: GptOssForCausalLM, values: Tensor, args: Arguments) -> float:
    """Return the mean loss over all windows of the values."""
    rows = windows(values, args.context)
    model.eval()
    total = sum(losses(model, part)[1].item() * len(part) for part in rows.split(args.batch_size))
    model.train()
    return total / len(rows)


def learning_rate_scale(step: int, args: Arguments) -> float:
    """Return the factor on the learning rate: linear warm-up, then a half cosine down to a tenth."""
    if step < args.warmup_steps:
        return (step + 1) / args.warmup_steps
    progress = (step - args.warmup_steps) / max(1, args.steps - args.warmup_steps)
    return 0.1 + 0.45 * (1.0 + math.cos(math.pi * progress))


def make_optimiser(model: GptOssForCausalLM, args: Arguments) -> torch.optim.AdamW:
    """Return AdamW with weight decay on the matrices only, not on biases, norms and attention sinks."""
    named = list(model.named_parameters())
    plain = [p for name, p in named if p.ndim == 1 or name.endswith("bias")]
    decayed = [p for name, p in named if not (p.ndim == 1 or name.endswith("bias"))]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95))


def make_progress(console: Console) -> Progress:
    """Return the progress bar: step, losses in nats per byte, time left."""
    return Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=16),
        TextColumn("loss {task.fields[train]:.3f} (validation {task.fields[validation]:.3f})"),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def train(
    model: GptOssForCausalLM, train_values: Tensor, held_out: Tensor, args: Arguments, console: Console
) -> LossCurve:
    """Train the model in place and return its loss curve."""
    optimiser = make_optimiser(model, args)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: learning_rate_scale(step, args))
    generator = torch.Generator().manual_seed(args.seed)
    first = evaluate(model, held_out, args)
    curve = LossCurve(train=[], validation=[(0, first)])
    recent: list[float] = []
    with make_progress(console) as progress:
        bar = progress.add_task("train", total=args.steps, train=math.nan, validation=first)
        for step in range(1, args.steps + 1):
            loss, entropy = losses(model, sample_batch(train_values, args, generator), args.balance_coefficient)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.gradient_clip)
            optimiser.step()
            schedule.step()
            recent.append(entropy.item())
            if step % LOG_EVERY == 0 or step == args.steps:
                curve.train.append((step, sum(recent) / len(recent)))
                recent.clear()
            if step % args.evaluate_every == 0 or step == args.steps:
                curve.validation.append((step, evaluate(model, held_out, args)))
            progress.update(bar, advance=1, train=entropy.item(), validation=curve.validation[-1][1])
    return curve


@torch.no_grad()
def capture_layer(model: GptOssForCausalLM, held_out: Tensor, args: Arguments) -> Capture:
    """Run the model on the first kept_tokens held-out bytes and record one MoE layer by forward hooks."""
    seen: dict[str, Tensor] = {}

    def on_router(_module: torch.nn.Module, _inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        seen["router_logits"], seen["top_experts"] = outputs[0], outputs[2]

    def on_layer(_module: torch.nn.Module, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
        seen["x"], seen["output"] = inputs[0].flatten(0, 1), outputs[0].flatten(0, 1)

    layer = model.model.layers[args.kept_layer].mlp
    hooks = [layer.router.register_forward_hook(on_router), layer.register_forward_hook(on_layer)]
    model.eval()
    model(input_ids=held_out[: args.kept_tokens].view(-1, args.context))
    for hook in hooks:
        hook.remove()
    return Capture(**{name: value.clone() for name, value in seen.items()})


def layer_tensors(model: GptOssForCausalLM, capture: Capture, args: Arguments) -> dict[str, Tensor]:
    """Return the tensors of the file: weights and hidden states as bf16, router logits as fp32."""
    experts = model.model.layers[args.kept_layer].mlp.experts
    names = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    tensors = {name: getattr(experts, name).detach().to(torch.bfloat16).contiguous() for name in names}
    tensors["x"] = capture.x.to(torch.bfloat16).contiguous()
    tensors["router_logits"] = capture.router_logits.float().contiguous()
    return tensors


def layer_metadata(model: GptOssForCausalLM, args: Arguments) -> dict[str, str]:
    """Return the string metadata of the file."""
    layer_config = {
        "top_k": model.config.num_experts_per_tok,
        "scoring": "topk_softmax",
        "renormalize": False,
        "renormalize_eps": 1e-20,
        "routed_scaling_factor": 1.0,
        "activation": "swiglu",
        "alpha": model.config.swiglu_alpha,
        "limit": model.config.swiglu_limit,
        "up_offset": 1.0,
        "gate_up_layout": "interleaved",
    }
    source = (
        f"MoE layer {args.kept_layer} (counted from 0) of a {args.layers}-layer byte-level gpt-oss model trained for "
        f"{args.steps} steps on the text of Python's pydoc_data.topics by data/train_tiny_gpt_oss.py, "
        f"with its input on {args.kept_tokens} held-out bytes."
    )
    return {
        "format": FORMAT,
        "config": json.dumps(layer_config),
        "transposed": json.dumps(["gate_up_proj", "down_proj"]),
        "source": source,
    }


def rest_tensors(model: GptOssForCausalLM, args: Arguments) -> dict[str, Tensor | NF4Tensor]:
    """Return all that the layer file lacks, by the model's own names: experts in 4 bits, everything else in bf16."""
    kept = f"model.layers.{args.kept_layer}.mlp.experts."
    low = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items() if not name.startswith(kept)}
    return {
        name: nf4.quantize_tensor(value, nested=True) if name.endswith(("gate_up_proj", "down_proj")) else value
        for name, value in low.items()
    }


def as_stored(model: GptOssForCausalLM, rest: dict[str, Tensor | NF4Tensor]) -> dict[str, Tensor]:
    """Return the model's parameters as the two files have them."""
    stored = {name: value.to(torch.bfloat16).float() for name, value in model.state_dict().items()}
    packed = {name: value for name, value in rest.items() if isinstance(value, NF4Tensor)}
    return stored | {name: moe_ref.nf4.decode(value).float() for name, value in packed.items()}


def with_sorted_metadata(content: bytes) -> bytes:
    """Return a safetensors file with its metadata keys in sorted order.

    The safetensors package writes them in an order that changes from run to run; sorted, equal contents give
    equal bytes. The tensor offsets count from the end of the header, so they stay true.
    """
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded + content[end:]


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name in the same folder, then rename it."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_model(model: GptOssForCausalLM, capture: Capture, args: Arguments) -> tuple[Path, Path]:
    """Write the kept layer and the rest of the model, and give the model the parameters that the files have."""
    layer_path, rest_path = (args.output / f"{name}.safetensors" for name in (LAYER_NAME, REST_NAME))
    content = save(layer_tensors(model, capture, args), metadata=layer_metadata(model, args))
    write_atomically(layer_path, with_sorted_metadata(content))
    rest = rest_tensors(model, args)
    nf4.save(rest_path, rest)
    write_atomically(rest_path, with_sorted_metadata(rest_path.read_bytes()))
    model.load_state_dict(as_stored(model, rest))
    return layer_path, rest_path


def read_layer(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a layer file."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def canonical_weights(tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, Tensor]:
    """Widen the tensors to fp64 and give the weights their canonical axes, [E, 2I, H] and [E, H, I]."""
    transposed = json.loads(metadata["transposed"])
    return {name: value.double().mT if name in transposed else value.double() for name, value in tensors.items()}


def compute_layer(tensors: dict[str, Tensor], metadata: dict[str, str]) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Compute the layer from the file alone, in fp64.

    Returns the output [T, H], the chosen experts [T, top_k] and the fractions of values that the clamp changes.
    """
    config = json.loads(metadata["config"])
    wide = canonical_weights(tensors, metadata)
    top_logits, top_experts = wide["router_logits"].topk(config["top_k"], dim=-1)
    top_weights = top_logits.softmax(dim=-1)
    output = torch.zeros_like(wide["x"])
    clamped = {"gate": 0, "up": 0}
    for expert in range(wide["router_logits"].shape[1]):
        token, slot = torch.where(top_experts == expert)
        gate_up = wide["x"][token] @ wide["gate_up_proj"][expert].T + wide["gate_up_proj_bias"][expert]
        gate, up = gate_up[:, 0::2], gate_up[:, 1::2]
        clamped["gate"] += int((gate > config["limit"]).sum())
        clamped["up"] += int((up.abs() > config["limit"]).sum())
        gate, up = gate.clamp(max=config["limit"]), up.clamp(-config["limit"], config["limit"])
        hidden = (up + config["up_offset"]) * gate * torch.sigmoid(config["alpha"] * gate)
        result = hidden @ wide["down_proj"][expert].T + wide["down_proj_bias"][expert]
        output.index_add_(0, token, result * top_weights[token, slot, None])
    values = top_experts.numel() * wide["down_proj"].shape[2]
    return output, top_experts, {name: count / values for name, count in clamped.items()}


def agreement(path: Path, capture: Capture) -> dict[str, Any]:
    """Compare the layer computed from the stored file with the model's own fp32 output for the same tokens."""
    output, top_experts, clamped = compute_layer(*read_layer(path))
    expected = capture.output.double()
    row_errors = (output - expected).norm(dim=1) / expected.norm(dim=1)
    same = (top_experts.sort(dim=1).values == capture.top_experts.sort(dim=1).values).all(dim=1)
    return {
        "relative_error": ((output - expected).norm() / expected.norm()).item(),
        "largest_relative_error_of_a_token": row_errors.max().item(),
        "largest_absolute_error": (output - expected).abs().max().item(),
        "largest_absolute_output": expected.abs().max().item(),
        "tokens_with_the_same_experts": int(same.sum()),
        "fraction_of_gate_values_clamped": clamped["gate"],
        "fraction_of_up_values_clamped": clamped["up"],
    }


def routing_statistics(capture: Capture, experts: int) -> dict[str, Any]:
    """Describe how unevenly the kept tokens are spread over the experts."""
    counts = torch.bincount(capture.top_experts.flatten(), minlength=experts)
    share = counts.double() / counts.sum()
    entropy = torch.special.entr(share).sum().item() / math.log(experts)
    top_logits = capture.router_logits.double().topk(capture.top_experts.shape[1] + 1, dim=1).values
    return {
        "tokens": len(capture.x),
        "assignments": int(counts.sum()),
        "tokens_per_expert": counts.tolist(),
        "share_of_assignments_per_expert": [round(value, 6) for value in share.tolist()],
        "mean_tokens_per_expert": counts.double().mean().item(),
        "largest_tokens_per_expert": int(counts.max()),
        "smallest_tokens_per_expert": int(counts.min()),
        "max_over_mean": (counts.max() / counts.double().mean()).item(),
        "normalised_entropy": entropy,
        "experts_without_tokens": int((counts == 0).sum()),
        "smallest_gap_between_last_chosen_and_first_unchosen_logit": (top_logits[:, -2] - top_logits[:, -1])
        .min()
        .item(),
    }


def draw_losses(axes: Axes, curve: LossCurve) -> None:
    """Draw both loss curves with their final values."""
    axes.plot(*zip(*curve.train, strict=True), color="#8fb3d9", linewidth=1.5, label="training")
    axes.plot(*zip(*curve.validation, strict=True), color="#c0392b", marker="o", markersize=4, label="validation")
    last_step, last_loss = curve.validation[-1]
    axes.annotate(
        f"{last_loss:.2f}",
        (last_step, last_loss),
        xytext=(0, 9),
        textcoords="offset points",
        ha="center",
        color="#c0392b",
    )
    axes.set(
        xlabel="optimiser step",
        ylabel="loss (nats per byte)",
        title="Loss of the byte-level model\non training and held-out text",
    )
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def draw_routing(axes: Axes, statistics: dict[str, Any], args: Arguments) -> None:
    """Draw the number of tokens of each expert."""
    counts = statistics["tokens_per_expert"]
    mean = statistics["mean_tokens_per_expert"]
    axes.bar(range(len(counts)), counts, color="#4a7a4c", width=0.8)
    axes.axhline(mean, color="black", linestyle="--", linewidth=1, label=f"mean, {mean:g} tokens")
    axes.set(
        xlabel="expert id",
        ylabel=f"tokens routed to the expert (of {statistics['tokens']})",
        title=f"Routing in the kept layer, {args.top_k} experts per token\n"
        f"max/mean {statistics['max_over_mean']:.1f}, {statistics['experts_without_tokens']} experts without tokens",
    )
    axes.set_xticks(range(0, len(counts), 4))
    axes.set_xlim(-0.8, len(counts) - 0.2)
    axes.set_ylim(top=max(counts) * 1.15)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="upper right")


def draw_picture(curve: LossCurve, statistics: dict[str, Any], args: Arguments) -> bytes:
    """Return a PNG with the loss curve beside the tokens per expert."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_losses(left, curve)
    draw_routing(right, statistics, args)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def versions() -> dict[str, str]:
    """Return the versions that the result depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "matplotlib": matplotlib.__version__,
    }


def describe_text(text: bytes, train_values: Tensor, held_out: Tensor) -> dict[str, Any]:
    """Describe the text and its split."""
    return {
        "source": "pydoc_data.topics, values joined in the order of the sorted keys",
        "sha256": hashlib.sha256(text).hexdigest(),
        "bytes": len(text),
        "training_bytes": len(train_values),
        "held_out_bytes": len(held_out),
    }


def describe_file(path: Path) -> dict[str, Any]:
    """Describe a file by its size and its digest."""
    return {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def report_text(report: dict[str, Any]) -> str:
    """Return the report as indented JSON with each list of plain values on one line."""
    text = json.dumps(report, indent=2)
    return re.sub(r"\[[^\[\]{}]*\]", lambda match: " ".join(match[0].split()), text) + "\n"


def check(args: Arguments, held_out: Tensor) -> None:
    """Refuse arguments that do not fit together."""
    if args.kept_layer >= args.layers:
        raise typer.BadParameter(f"the model has {args.layers} layers, counted from 0", param_hint="--kept-layer")
    if args.top_k >= args.experts:
        raise typer.BadParameter(f"must be smaller than the {args.experts} experts", param_hint="--top-k")
    if args.heads % args.key_value_heads:
        raise typer.BadParameter(f"must divide the {args.heads} heads", param_hint="--key-value-heads")
    if args.head_dim % 2:
        raise typer.BadParameter("must be even", param_hint="--head-dim")
    if args.kept_tokens % args.context or args.kept_tokens > len(held_out):
        hint = f"must be a multiple of {args.context} (--context) and at most {len(held_out)}"
        raise typer.BadParameter(hint, param_hint="--kept-tokens")


@with_options(Arguments)
def main(args: Arguments) -> None:
    """Train a small gpt-oss model on Python's documentation topics and write one of its MoE layers, and the rest."""
    console = Console()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    text = read_text()
    train_values, held_out = split_text(text)
    check(args, held_out)
    args.output.mkdir(parents=True, exist_ok=True)

    model = build_model(args)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(f"{parameters:,} parameters, {len(train_values):,} bytes to train on, {len(held_out):,} held out")
    started = time.monotonic()
    curve = train(model, train_values, held_out, args, console)
    seconds = time.monotonic() - started

    capture = capture_layer(model, held_out, args)
    layer_path, rest_path = write_model(model, capture, args)
    statistics = routing_statistics(capture, args.experts)
    report = {
        "arguments": {name: value for name, value in asdict(args).items() if name != "output"},
        "versions": versions(),
        "text": describe_text(text, train_values, held_out),
        "model_parameters": parameters,
        "training_seconds": round(seconds, 1),
        "final": {"train_loss": curve.train[-1][1], "validation_loss": curve.validation[-1][1]},
        "routing": statistics,
        "agreement_with_the_model": agreement(layer_path, capture),
        "layer_file": describe_file(layer_path),
        "rest_file": describe_file(rest_path) | {"validation_loss_of_both_files": evaluate(model, held_out, args)},
        "loss_unit": "nats per byte",
        "loss_curve": asdict(curve),
    }
    write_atomically(args.output / f"{LAYER_NAME}.json", report_text(report).encode())
    write_atomically(args.output / f"{LOSS_NAME}.png", draw_picture(curve, statistics, args))
    shown = ("final", "agreement_with_the_model", "layer_file", "rest_file")
    console.print_json(data={name: report[name] for name in shown})
    console.print(f"max over mean {statistics['max_over_mean']:.2f}, entropy {statistics['normalised_entropy']:.3f}")


if __name__ == "__main__":
    typer.run(main)
