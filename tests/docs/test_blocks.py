"""Every block of Python on a page is executed, here or by the page's own test, and every command of ours exists."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import executors
import moe_ref
from executors._cli.app import app
from executors.layer_file import load_layer

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ELSEWHERE = {  # by page, the test that executes it
    "README.md": "tests/docs/test_docs.py",
    "docs/spec.md": "tests/docs/test_pseudocode.py",
    "docs/adding-an-executor.md": "tests/docs/test_adding_an_executor.py",
    "docs/fine-tuning.md": "tests/docs/test_fine_tuning_page.py",
    "docs/jax.md": "tests/moe_ref/test_jax.py",
    "docs/parallel.md": "tests/docs/test_parallel_page.py",
    "docs/porting.md": "tests/docs/test_porting_page.py",
    "docs/transformers.md": "tests/docs/test_transformers_page.py",
    "docs/tutorials/fine-tune.md": "tests/docs/test_tutorials.py",
    "docs/tutorials/kernel.md": "tests/docs/test_tutorials.py",
}
E, H, I, T, K = 8, 16, 32, 5, 4  # noqa: E741  # the names of docs/spec.md
SHAPES = {"gate_up_proj": (E, 2 * I, H), "down_proj": (E, H, I), "gate_up_proj_bias": (E, 2 * I)}
SHAPES |= {"down_proj_bias": (E, H), "x": (T, H), "router_logits": (T, E), "direction": (T, H)}


def blocks(page: str) -> list[str]:
    """Of Python, as they stand on a page."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)


def layer() -> dict[str, Any]:
    """What pages take for granted."""
    random = torch.Generator().manual_seed(0)
    given: dict[str, Any] = {name: torch.randn(*shape, generator=random) / 4 for name, shape in SHAPES.items()}
    given["ids"], given["w"] = torch.randint(E, (T, K), generator=random), torch.full((T, K), 0.25)
    weights = moe_ref.MoEWeights(given["gate_up_proj"], given["down_proj"], config=moe_ref.MoEConfig(top_k=K))
    return given | {"weights": weights, "executors": executors, "moe_ref": moe_ref, "torch": torch}


def test_every_page_with_blocks_has_a_test() -> None:
    here = set(re.findall(r"blocks\(\"(docs/[^\"]+)\"\)", Path(__file__).read_text()))
    found = {page.relative_to(ROOT).as_posix() for page in PAGES if "\n```python\n" in page.read_text()}
    assert found == here | ELSEWHERE.keys()
    assert not here & ELSEWHERE.keys()
    for page, test in ELSEWHERE.items():
        assert Path(page).name in (ROOT / test).read_text(), f"{test} does not read {page}"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, in forward mode
def test_calls_of_executors() -> None:
    first, second = blocks("docs/executors.md")
    given = layer()
    exec(first, given)
    exact = given["y"].double()
    assert (exact - given["y"]).abs().max() < 1e-5
    exec(second, given)
    assert given["tangent"].shape == (T, H)


def test_a_layer_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = blocks("docs/layer-file.md")
    monkeypatch.chdir(tmp_path)
    given = layer()
    exec(block, given)
    assert torch.equal(load_layer(Path("layer.safetensors")).x, given["x"])


def test_converters_of_four_bits() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    whole, linears, state = blocks("docs/nf4-weights.md")
    parameter = torch.randn(E, 2 * I, 64)

    def linear(matrix: torch.Tensor) -> torch.nn.Module:
        made = bitsandbytes.nn.Linear4bit(64, 2 * I, bias=False, quant_type="nf4")
        made.weight = bitsandbytes.nn.Params4bit(matrix, requires_grad=False, quant_type="nf4")
        return made.to("cpu")

    holder = torch.nn.Module()
    holder.gate_up_projs = torch.nn.ModuleList(linear(matrix) for matrix in parameter)
    names = {f"model.layers.0.mlp.experts.{name}": value for name, value in holder.state_dict().items()}
    given = {"bitsandbytes": bitsandbytes, "parameter": parameter.transpose(1, 2).contiguous(), "experts": holder}
    given |= {"state": names, "nf4": executors.nf4}
    for block in (whole, linears):
        exec(block, given)
    first = given["gate_up_proj"]
    exec(state, given)
    assert first.shape == given["gate_up_proj"].shape == given["tensor"].shape == (E, 2 * I, 64)
    assert torch.equal(first.codes, given["gate_up_proj"].codes)


def test_a_router_told_apart() -> None:
    transformers = pytest.importorskip("transformers")
    (block,) = blocks("docs/routers.md")
    config = transformers.MixtralConfig(
        hidden_size=H, intermediate_size=I, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=E, num_experts_per_tok=2, vocab_size=32,
    )  # fmt: skip
    given = layer() | {"model": transformers.MixtralForCausalLM(config), "hidden_states": layer()["x"]}
    exec(block, given)
    assert torch.equal(given["exact"].topk_ids.long(), given["topk_ids"])


def test_calls_of_triton() -> None:
    pytest.importorskip("triton")
    import interpreted  # noqa: F401  # without a GPU

    calls, tuned = blocks("docs/triton.md")
    given = layer()
    exact = moe_ref.moe(given["x"], given["router_logits"], given["weights"])
    for line in calls.splitlines():
        exec(line, given)
        torch.testing.assert_close(given["y"].double(), exact, rtol=1e-4, atol=1e-5)
    exec(tuned, given)
    torch.testing.assert_close(given["y"].double(), exact, rtol=1e-4, atol=1e-5)


KERNEL = """
import torch, triton
import triton.language as tl

@triton.jit
def double(x, y, N: tl.constexpr):
    places = tl.arange(0, N)
    tl.store(y + places, 2 * tl.load(x + places))

def my_function(x):
    double[1,](x, y, x.numel())

x = torch.arange(64.0)
y = torch.zeros(64)
{block}
assert torch.equal(y, 2 * x)
"""


def test_a_kernel_executed(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    (block,) = blocks("docs/adr/0013-ptx-on-a-cpu.md")
    file = tmp_path / "mine.py"
    file.write_text(KERNEL.replace("{block}", block))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, str(file)],
        env=environment | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr


def commands() -> list[tuple[str, str]]:
    """Of ``python -m executors``, with the pages that show them."""
    found = []
    for page in PAGES:
        for line in re.findall(r"^ *(?:\$ )?python -m executors (.*?)$", page.read_text(), flags=re.MULTILINE):
            found.append((page.relative_to(ROOT).as_posix(), line.split("  #")[0].strip()))
    return found


def test_commands_are_understood() -> None:
    """Each has a name and options that there are."""
    group: Any = typer.main.get_command(app)
    assert len(commands()) > 20
    for page, line in commands():
        name, *arguments = shlex.split(line)
        assert name in group.commands, f"{page}: no command {name}"
        command = group.commands[name]
        command.make_parser(command.context_class(command)).parse_args(arguments)
