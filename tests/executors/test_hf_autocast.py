"""The bridge to transformers under autocast: hidden states are cast to the weights' dtype, and y back (T1)."""

import pytest
import torch

pytest.importorskip("transformers", reason="the extra moe-ref[hf]")

import executors.hf
import families
from executors import Executor
from test_hf_calls_of import experts, slots
