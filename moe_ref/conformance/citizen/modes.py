"""Modes of torch that are none of the layer's business: it gives the same bits in each."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import torch

from moe_ref.conformance.citizen.case import Case, NotApplicableError
from moe_ref.conformance.judgement.call import Inputs

CUBLAS = "torch refuses cuBLAS in deterministic mode unless CUBLAS_WORKSPACE_CONFIG is set"


def grad_mode(case: Case) -> None:
    """Under no_grad and inference_mode y has the same bits and needs no gradient; under enable_grad it needs one."""
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = case.call(case.inputs())
        case.demand(not y.requires_grad, f"y.requires_grad=True under {mode.__name__}")
        case.demand(mode is torch.no_grad or y.is_inference(), "y is no inference tensor under inference_mode")
        case.demand_same({"y": y.clone()}, f"under {mode.__name__}", {"y": case.plain["y"]})
    case.needs_backward()
    with torch.no_grad(), torch.enable_grad():
        inputs = case.inputs()
        y = case.call(inputs)
    case.demand_same(case.backward(inputs, y), "under enable_grad within no_grad")


def inference_weights(case: Case) -> None:
    """Weights made in inference_mode work without gradients; with them y has the right gradient or torch's error."""
    with torch.inference_mode():
        inputs = case.inputs()
    given = replace(case.inputs(), weights=inputs.weights)
    plain = {"y": case.plain["y"]}
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            case.demand_same({"y": case.call(given).clone()}, f"inference weights under {mode.__name__}", plain)
    case.needs_backward()
    frozen = case.inputs()
    for tensor in frozen.weights.parameters().values():
        tensor.requires_grad_(False)
    expected = case.run(frozen)
    try:
        actual = case.run(given)
    except RuntimeError as error:
        case.demand("nference tensor" in str(error), f"inference weights: {error!r}, but must name inference tensors")
    else:
        case.demand_same(
            {n: v for n, v in actual.items() if n in expected}, "inference weights with gradients", expected
        )


def deterministic_algorithms(case: Case) -> None:
    """torch.use_deterministic_algorithms(True) raises nothing and changes no bit, and with warn_only nothing warns."""
    for warn_only in (False, True):
        try:
            with _deterministic(warn_only), warnings.catch_warnings():
                warnings.simplefilter("error")
                actual = case.run(case.inputs())
        except (RuntimeError, UserWarning) as error:
            if "CUBLAS_WORKSPACE_CONFIG" in str(error):
                raise NotApplicableError(CUBLAS) from error
            case.fail(f"use_deterministic_algorithms(True, warn_only={warn_only}): {error!r}")
        case.demand_same(actual, f"under use_deterministic_algorithms(True, warn_only={warn_only})")


def default_dtype(case: Case) -> None:
    """torch.set_default_dtype has no influence on bits or dtypes."""
    before = torch.get_default_dtype()
    for dtype in (torch.float64, torch.bfloat16):
        inputs = case.inputs()
        torch.set_default_dtype(dtype)
        try:
            actual = case.run(inputs)
        finally:
            torch.set_default_dtype(before)
        case.demand_same(actual, f"with {dtype} as the default")


def default_device(case: Case) -> None:
    """torch.set_default_device has no influence on bits or devices."""
    inputs = case.inputs()
    with torch.device("meta"):  # as set_default_device, for as long as the block runs
        actual = case.run(inputs)
    case.demand_same(actual, "with meta as the default device")


def autocast(case: Case) -> None:
    """torch.autocast around a call has no influence on bits, of y or of gradients."""
    inputs = case.inputs()
    with _autocast(inputs):
        y = case.call(inputs)
    actual = case.backward(inputs, y) if case.executor.capabilities.backward else {"y": y.detach()}
    case.demand_same(actual, "under autocast")


def _autocast(inputs: Inputs) -> AbstractContextManager[object]:
    other = torch.bfloat16 if inputs.x.dtype != torch.bfloat16 else torch.float16
    return torch.autocast(inputs.x.device.type, dtype=other)


@contextmanager
def _deterministic(warn_only: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
