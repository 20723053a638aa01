"""What tests of ``triton`` share."""

import os
import subprocess
import sys

import pytest
import torch

from executors._triton.device import INTERPRETED
from moe_ref import MoEConfig
from moe_ref.conformance.judgement.call import Inputs, to_torch
from moe_ref.conformance.problems.build import build
from moe_ref.conformance.problems.problem import Problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPT_OSS = MoEConfig(2, scoring="topk_softmax", alpha=1.702, limit=7.0, up_offset=1.0, gate_up_layout="interleaved")
ALIGNED = Problem(40, 5, 80, 48, GPT_OSS, "bfloat16", gate_up_bias=True, down_bias=True)

interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")


def inputs_of(problem: Problem) -> Inputs:
    return to_torch(problem, build(problem), DEVICE)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in a process of its own, in which kernels are interpreted only if the environment says so."""
    return subprocess.run([sys.executable, *arguments], env=os.environ | environment, capture_output=True, text=True)
