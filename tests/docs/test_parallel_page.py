"""docs/parallel.md: its example runs, and prints what the page says, but for figures of the machine."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.run import get_args_parser

from moe_ref.types import MoEConfig, MoEWeights

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "parallel.md").read_text()


def test_the_example_runs_as_the_page_says() -> None:
    (command,) = re.findall(r"```sh\n(torchrun .*)\n```", PAGE)
    (printed,) = re.findall(r"```text\n(rank 0 has.*?)```", PAGE, re.DOTALL)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "torch.distributed.run", *command.split()[1:]]
    ran = subprocess.run(line, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    found = [text for text in ran.stdout.splitlines() if text]
    assert [plain(text) for text in found] == [plain(text) for text in printed.splitlines()]
    first, last = (float(text.split()[-1]) for text in found if text.startswith("step"))
    assert last < first / 10
    assert all(float(text.split()[-1]) < 1e-5 for text in found if "largest difference" in text)


@pytest.mark.nightly
def test_the_plan_is_what_the_command_prints() -> None:
    (command,) = re.findall(r"```sh\npython -m (executors plan .*?) --plot.*\n```", PAGE)
    (printed,) = re.findall(r"```text\n(deepseek-v3: .*?)\n```", PAGE, re.DOTALL)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    line = [sys.executable, "-m", *command.split()]
    ran = subprocess.run(line, capture_output=True, text=True, check=True, env=environment, encoding="utf-8")
    found = iter([text.rstrip() for text in ran.stdout.splitlines()])
    assert [text for text in printed.splitlines() if text not in found] == []  # in this order, between notes


def plain(text: str) -> str:
    """Without what differs between machines."""
    return re.sub(r"\d\.\d+(e-\d+)?$", "figure", text)


def test_without_torchrun_it_says_how() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RANK"} | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, "examples/expert_parallel.py"]
    ran = subprocess.run(line, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    assert ran.returncode == 2
    assert ran.stderr.strip().endswith("torchrun --nproc-per-node 2 examples/expert_parallel.py")


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_blocks_run_and_agree() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    weights = MoEWeights(torch.randn(4, 12, 8), torch.randn(4, 8, 6), config=MoEConfig(2))
    names = {"weights": weights, "group": None, "x": torch.randn(6, 8), "router": torch.randn(8, 4)}
    names |= {"shared_experts": torch.zeros_like, "init_device_mesh": init_device_mesh}
    names |= {"device": "cpu", "nodes": 1, "ranks_of_a_node": 1}
    outputs = []
    for block in blocks:
        exec(block, names)
        outputs += [names["y"]] if "y" in names else []
    outputs.append(torch.cat(names["halves"]))
    assert len(blocks) >= 3
    assert torch.equal(names["whole"].gate_up_proj, weights.gate_up_proj)
    for y in outputs[1:]:
        torch.testing.assert_close(y, outputs[0])


def test_launches_are_understood() -> None:
    lines = re.findall(r"^(?:srun )?torchrun (.*)$", PAGE.replace("\\\n", ""), re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        given = get_args_parser().parse_args(shlex.split(line))
        assert given.training_script.endswith(".py")
