"""What native and grouped_mm promise beyond the numbers: synchronisations, tracing, memory, frozen inputs, options.

The suite has the rest.
"""

import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import executors
from executors import _grouping, _layer, _operator, grouped_mm, native
from moe_ref import MoEConfig, MoEWeights
from moe_ref.conformance.build import build
from moe_ref.conformance.call import Inputs, call, to_torch
from moe_ref.conformance.problem import Problem

CONFIG = MoEConfig(2, scoring="sigmoid", renormalize=True, limit=1.0, up_offset=1.0, gate_up_layout="interleaved")
PROBLEM = Problem(12, 5, 16, 8, CONFIG, gate_up_bias=True, down_bias=True)
GROUPED = replace(CONFIG, num_groups=2, topk_groups=1, scale_input=True)
EVERYTHING = Problem(
    12, 6, 16, 8, GROUPED, gate_up_bias=True, down_bias=True, selection_bias="small", gate_up_rank=2, down_rank=3
)
OPERATORS = {"native": native.OPERATOR, "grouped_mm": grouped_mm.OPERATOR}
MATRICES = ("gate_up_proj", "down_proj")

# Operators that wait for a GPU: they bring a value to the host, or have a shape that depends on one.
SYNCHRONISING = ("_local_scalar_dense", "aten::item", "nonzero", "masked_select", "bincount", "unique")

both = pytest.mark.parametrize("name", OPERATORS)


class Watched(TorchDispatchMode):
    """Sees every operator below autograd, those inside the executors' own as well.

    A mode is off while an operator that it was told of runs, so a custom operator's insides would go unseen: here its
    kernel is run with the mode on.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kernels = {}
        for name, operator in OPERATORS.items():
            kernels |= {f"moe_ref::{name}": operator.forward, f"moe_ref::{name}_backward": operator.backward}
        if func.name() in kernels:
            with self:
                return kernels[func.name()]._init_fn(*args, **kwargs or {})
        out = func(*args, **kwargs or {})
        self.saw(func.name(), out)
        return out

    def saw(self, name: str, out: object) -> None:
        """Called with each operator and its result."""


class HostReads(Watched):
    """Lists what would make the host wait for a GPU, beside .cpu()."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []
        self.count = 0

    def saw(self, name: str, out: object) -> None:
        self.count += 1
        if any(word in name for word in SYNCHRONISING):
            self.reads.append(name)


def inputs_of(problem: Problem) -> Inputs:
    return to_torch(problem, build(problem))


def arguments(inputs: Inputs) -> tuple[list[object], list[object]]:
    """The operator's tensors, and what is static."""
    given = _operator.arguments_of(inputs.x, inputs.topk_ids, inputs.topk_weights, inputs.weights)
    return list(given[:11]), list(given[11:])


@both
@pytest.mark.parametrize("entry", ["layer", "experts"])
def test_host_reads(name: str, entry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """native reads the group offsets once per forward pass, grouped_mm never does; backward reads nothing."""
    reads: list[str] = []
    to_host = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: reads.append("cpu") or to_host(self))
    inputs = inputs_of(replace(EVERYTHING, entry=entry))
    expected = ["cpu"] if name == "native" else []
    with HostReads() as forward:
        y = call(executors.get(name), inputs)
    assert reads == expected
    assert forward.reads == []
    with HostReads() as backward:
        y.backward(inputs.dy)
    assert reads == expected
    assert backward.reads == []
    assert min(forward.count, backward.count) > 50  # the insides were seen


@both
def test_host_reads_are_seen_inside_the_operator(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    combine = _layer.combine
    monkeypatch.setattr(_layer, "combine", lambda o, *a: combine(o * o.isfinite().all().item(), *a))
    inputs = inputs_of(PROBLEM)
    with HostReads() as mode:
        call(executors.get(name), inputs)
        torch.ones(3).nonzero()
    assert len(mode.reads) > 1


def without_values(inputs: Inputs) -> tuple[list[torch.Tensor | None], list[object]]:
    """The operator's arguments as tensors that have no values: whatever looks at one raises."""
    tensors, static = arguments(inputs)
    return [None if t is None else t.detach().to("meta") for t in tensors], static


def kernel(operator):  # type: ignore[no-untyped-def]
    """What runs inside the operator; autocast, which it turns off, knows no such device."""
    return operator._init_fn.__wrapped__


@pytest.mark.parametrize("problem", [PROBLEM, EVERYTHING, replace(PROBLEM, tokens=0), replace(PROBLEM, hidden=7)])
def test_grouped_mm_never_looks_at_a_value(problem: Problem) -> None:
    """Forward and backward on tensors without values: what a host would have to wait for raises here."""
    inputs = inputs_of(replace(problem, entry="experts", dtype="bfloat16", lora_dtype="bfloat16"))
    tensors, static = without_values(inputs)
    y, *kept = kernel(grouped_mm.OPERATOR.forward)(*tensors, True, *static)
    assert (y.shape, y.device.type) == (inputs.x.shape, "meta")
    needs = [True, True, *(t is not None for t in tensors[3:])]
    gradients = kernel(grouped_mm.OPERATOR.backward)(y, *kept, *tensors, needs, *static)
    for gradient, owner in zip(gradients, [tensors[0], *tensors[2:]], strict=True):
        assert owner is None or gradient.shape == owner.shape


def test_native_looks_at_its_offsets() -> None:
    """The trace above can fail."""
    tensors, static = without_values(inputs_of(replace(PROBLEM, entry="experts")))
    with pytest.raises(NotImplementedError, match="no data"):
        kernel(native.OPERATOR.forward)(*tensors, True, *static)


@both
@pytest.mark.parametrize("problem", [PROBLEM, EVERYTHING, replace(PROBLEM, gate_up_bias=False, down_bias=False)])
@pytest.mark.parametrize("tokens", [0, 12])
def test_operators_are_registered_right(name: str, tokens: int, problem: Problem) -> None:
    """torch.library.opcheck: schema, autograd, fake kernels, dynamic shapes."""
    operator = OPERATORS[name]
    inputs = inputs_of(replace(problem, tokens=tokens, entry="experts"))
    tensors, static = arguments(inputs)
    torch.library.opcheck(operator.forward, (*tensors, True, *static))
    _, *kept = (t.detach() for t in operator.forward(*tensors, True, *static))
    detached = [None if t is None else t.detach() for t in tensors]
    needs = [True, True, *(t is not None for t in tensors[3:])]
    torch.library.opcheck(operator.backward, (inputs.dy, *kept, *detached, needs, *static))


def test_the_choice_is_registered_right() -> None:
    from executors._routing import choose

    logits, bias = torch.randn(5, 8), torch.randn(8)
    torch.library.opcheck(choose, (logits, bias, 2, "sigmoid", 4, 2, "top2_sum"))
    torch.library.opcheck(choose, (logits, None, 2, "softmax", 1, 1, "max"))


@both
@pytest.mark.parametrize("problem", [PROBLEM, EVERYTHING])
def test_compiles_whole_with_dynamic_tokens(name: str, problem: Problem) -> None:
    """fullgraph=True, forward and backward, without a recompilation when T changes."""
    executor = executors.get(name)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _example: object) -> object:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(executor, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (12, 7, 33):
        of_tokens = replace(problem, tokens=tokens, seed=tokens)
        eager, traced = inputs_of(of_tokens), inputs_of(of_tokens)
        expected, actual = call(executor, eager), compiled(traced.x, traced.router_logits, traced.weights)
        expected.backward(eager.dy)
        actual.backward(traced.dy)
        assert torch.equal(expected, actual)
        for leaf, value in eager.tensors().items():
            assert torch.equal(value.grad, traced.tensors()[leaf].grad), leaf
    assert len(graphs) == 1


@both
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, inside inductor
def test_compiled_backends_agree(name: str, backend: str) -> None:
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    executor, inputs = executors.get(name), inputs_of(EVERYTHING)
    torch._dynamo.reset()
    compiled = torch.compile(executor, fullgraph=True, dynamic=True, backend=backend)
    y = compiled(inputs.x, inputs.router_logits, inputs.weights)
    torch.testing.assert_close(y, call(executor, inputs), rtol=1e-5, atol=1e-5)
    y.backward(inputs.dy)
    assert inputs.x.grad is not None


@both
@pytest.mark.parametrize("frozen", sorted(inputs_of(EVERYTHING).tensors()))
def test_frozen_input_costs_no_gradient(name: str, frozen: str) -> None:
    """Its gradient is never made; what others get does not change by a bit."""
    full, part = inputs_of(EVERYTHING), inputs_of(replace(EVERYTHING, frozen=frozenset({frozen})))
    call(executors.get(name), full).backward(full.dy)
    y = call(executors.get(name), part)
    with Shapes() as made:
        y.backward(part.dy)
    for leaf, value in part.tensors().items():
        assert (value.grad is None) == (leaf == frozen)
        assert value.grad is None or torch.equal(value.grad, full.tensors()[leaf].grad)
    if frozen in MATRICES:
        assert part.tensors()[frozen].shape not in made.shapes


class Shapes(Watched):
    """Collects the shapes of all results."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[torch.Size] = set()

    def saw(self, name: str, out: object) -> None:
        if isinstance(out, torch.Tensor):
            self.shapes.add(out.shape)


@both
def test_inference_keeps_nothing(name: str) -> None:
    inputs = inputs_of(replace(PROBLEM, entry="experts"))
    with torch.no_grad():
        assert not call(executors.get(name), inputs).requires_grad
    tensors, static = arguments(inputs)
    with torch.no_grad():
        z = OPERATORS[name].forward(*tensors, False, *static)[1]
    assert z.numel() == 0


@both
@pytest.mark.parametrize("problem", [PROBLEM, EVERYTHING, replace(PROBLEM, dtype="bfloat16", entry="experts")])
def test_recompute_keeps_no_z_and_gives_the_same_bits(name: str, problem: Problem) -> None:
    """D4."""
    kept: dict[bool, list[torch.Size]] = {}
    results = {}
    for recompute in (False, True):
        inputs, saved = inputs_of(problem), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.shape) or t, lambda t: t):
            y = call(executors.get(name, recompute=recompute), inputs)
        y.backward(inputs.dy)
        kept[recompute] = saved
        results[recompute] = {"y": y} | {n: t.grad for n, t in inputs.tensors().items()}
    z = torch.Size([problem.tokens * problem.top_k, problem.gate_up_rows])
    assert z in kept[False]
    assert z not in kept[True]
    for leaf, value in results[False].items():
        assert torch.equal(value, results[True][leaf]), leaf


@both
def test_memory_kept_for_backward(name: str) -> None:
    """What stays beside inputs and parameters is z and the order: nothing of S*H."""
    inputs, saved = inputs_of(replace(PROBLEM, entry="experts")), []
    given = {t.untyped_storage().data_ptr() for t in (*inputs.tensors().values(), inputs.topk_ids)}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call(executors.get(name), inputs)
    slots = PROBLEM.tokens * PROBLEM.top_k
    own = sorted(tuple(t.shape) for t in saved if t.untyped_storage().data_ptr() not in given)
    assert own == sorted([(slots, PROBLEM.gate_up_rows), (slots,), (PROBLEM.experts + 1,)])


@both
def test_options_are_checked(name: str) -> None:
    with pytest.raises(TypeError, match=r"^recompute=1: must be True or False$"):
        executors.get(name, recompute=1)
    with pytest.raises(TypeError, match=r"^option fast=True of executor '\w+': must be one of 'recompute'$"):
        executors.get(name, fast=True)


@both
def test_checkpointing_never_chooses_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """D5: under the policy, the replay uses the ids of the forward pass; without it, it chooses once more."""
    choices = count_choices(monkeypatch)
    context = partial(create_selective_checkpoint_contexts, executors.checkpoint_policy)
    expected = inputs_of(EVERYTHING)
    call(executors.get(name), expected).backward(expected.dy)
    for context_fn, times in ((context, 1), (None, 2)):
        choices.clear()
        inputs = inputs_of(EVERYTHING)
        arguments_ = {"context_fn": context_fn} if context_fn else {}
        y = checkpoint(
            executors.get(name), inputs.x, inputs.router_logits, inputs.weights, use_reentrant=False, **arguments_
        )
        y.backward(inputs.dy)
        assert len(choices) == times
        for leaf, value in expected.tensors().items():
            assert torch.equal(value.grad, inputs.tensors()[leaf].grad), leaf


@both
def test_a_replay_that_would_choose_otherwise(name: str) -> None:
    """D5: even if the logits change under the replay, the gradient is that of the experts of the forward pass."""
    problem = replace(PROBLEM, logits="ties")
    inputs, expected = inputs_of(problem), inputs_of(problem)
    call(executors.get(name), expected).backward(expected.dy)
    drift = torch.zeros(5)

    def layer(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return executors.get(name)(x, logits + drift, inputs.weights)

    context = partial(create_selective_checkpoint_contexts, executors.checkpoint_policy)
    y = checkpoint(layer, inputs.x, inputs.router_logits, use_reentrant=False, context_fn=context)
    drift += torch.arange(5) * 1e-6  # now the higher id wins ties
    y.backward(inputs.dy)
    torch.testing.assert_close(inputs.x.grad, expected.x.grad, rtol=1e-4, atol=1e-4)
    drift.zero_()
    again = inputs_of(problem)
    y = checkpoint(layer, again.x, again.router_logits, use_reentrant=False)
    drift += torch.arange(5) * 1e-6
    y.backward(again.dy)
    far = (again.x.grad - expected.x.grad).abs().amax()
    assert far > 0.01  # without the policy, other experts get the gradient


def count_choices(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets an entry for each time that experts are really chosen."""
    from executors import _routing

    chosen: list[int] = []
    largest = _routing._largest

    def counted(keys: torch.Tensor, count: int) -> torch.Tensor:
        if count == CONFIG.top_k:  # not the choice of groups
            chosen.append(1)
        return largest(keys, count)

    monkeypatch.setattr(_routing, "_largest", counted)
    return chosen


class Allocations(Watched):
    """The largest tensor that is made, views of a given one left out."""

    def __init__(self, given: torch.Tensor) -> None:
        super().__init__()
        self.given = given.untyped_storage().data_ptr()
        self.largest = 0

    def saw(self, name: str, out: object) -> None:
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() != self.given:
            self.largest = max(self.largest, out.numel())


@both
def test_transposed_weights_are_not_copied(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole stack is never made contiguous: a model that stores (E, H, 2I) passes a view."""
    inputs = inputs_of(replace(PROBLEM, tokens=4, weights_layout="transposed"))
    stack = inputs.weights.gate_up_proj
    assert not stack.is_contiguous()
    with torch.no_grad(), Allocations(stack) as honest:
        call(executors.get(name), inputs)
    assert 0 < honest.largest < stack.numel()
    product = _layer._linear
    monkeypatch.setattr(_layer, "_linear", lambda *a: stack.contiguous() is not None and product(*a))
    with torch.no_grad(), Allocations(stack) as copying:
        call(executors.get(name), inputs)
    assert copying.largest >= stack.numel()


@both
def test_other_libraries_are_unsupported(name: str) -> None:
    arrays = build(PROBLEM)
    with pytest.raises(executors.Unsupported, match=r"^x is a numpy.ndarray: must be a torch.Tensor$"):
        executors.get(name)(arrays.x, arrays.router_logits, arrays.weights)


def test_grouped_mm_has_no_float64() -> None:
    inputs = inputs_of(replace(PROBLEM, dtype="float64"))
    message = r"^x.dtype=float64: must be one of bfloat16, float16, float32 for grouped_mm$"
    with pytest.raises(executors.Unsupported, match=message):
        call(executors.get("grouped_mm"), inputs)
    assert executors.get("auto").choose(inputs.x, inputs.weights)[0] == "native"


@pytest.mark.parametrize(
    ("capability", "dtype", "free"),
    [((9, 0), "bfloat16", True), ((9, 0), "float32", False), ((8, 0), "bfloat16", False)],
)
def test_grouped_mm_says_where_it_waits(
    capability: tuple[int, int], dtype: str, free: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """explain has a remark, and capture is refused, wherever torch reads the offsets on the host."""
    inputs = inputs_of(replace(PROBLEM, dtype=dtype))
    executor = executors.get("grouped_mm")
    assert executor.note(inputs.x, inputs.weights) == ""  # on a CPU nothing waits
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert (executor.note(inputs.x, inputs.weights) == "") == free
    executor.check(inputs.x, inputs.weights)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    if free:
        executor.check(inputs.x, inputs.weights)
    else:
        with pytest.raises(executors.Unsupported, match=f"^x.dtype={dtype} during CUDA-graph capture: .* on the host"):
            executor.check(inputs.x, inputs.weights)


@both
def test_weights_may_hold_parameters(name: str) -> None:
    module = torch.nn.ParameterDict({"gate_up": torch.randn(3, 8, 4), "down": torch.randn(3, 4, 4)})
    weights = MoEWeights(module["gate_up"], module["down"], config=MoEConfig(1))
    executors.get(name)(torch.randn(5, 4), torch.randn(5, 3), weights).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@both
@pytest.mark.parametrize("entry", ["layer", "experts"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_autocast_changes_nothing(name: str, dtype: str, entry: str) -> None:
    """It would otherwise reach into the operator and round fp32 products to bf16, forward or backward."""
    plain, cast = (inputs_of(replace(EVERYTHING, dtype=dtype, entry=entry)) for _ in range(2))
    expected = call(executors.get(name), plain)
    expected.backward(plain.dy)
    with torch.autocast("cpu", torch.bfloat16):
        actual = call(executors.get(name), cast)
        actual.backward(cast.dy)
    assert torch.equal(expected, actual)
    for leaf, value in plain.tensors().items():
        assert torch.equal(value.grad, cast.tensors()[leaf].grad), leaf


def test_rows_past_the_last_group_are_never_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's grouped_mm leaves them unwritten, in forward and backward (R7, G1)."""
    problem = replace(EVERYTHING, entry="experts", empty_slots=True, tokens=33)
    inputs, spoiled = inputs_of(problem), inputs_of(problem)
    assert ((inputs.topk_ids < 0) | (inputs.topk_ids >= 6)).any()
    expected = call(executors.get("grouped_mm"), inputs)
    expected.backward(inputs.dy)
    multiply, seen = torch.nn.functional.grouped_mm, []

    def leaving_nan(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        out = multiply(a, b, offs=offs)
        if b.ndim == 3:
            seen.append(len(out) - int(offs[-1]))
            out[int(offs[-1]) :] = torch.nan
        return out

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", leaving_nan)
    actual = call(executors.get("grouped_mm"), spoiled)
    actual.backward(spoiled.dy)
    assert min(seen) > 0
    assert torch.equal(expected, actual)
    for leaf, value in inputs.tensors().items():
        assert torch.equal(value.grad, spoiled.tensors()[leaf].grad), leaf


def test_offsets_are_64_bit() -> None:
    """E5."""
    ids = torch.tensor([[0, 1], [1, 2]], dtype=torch.int32)
    assert [tensor.dtype for tensor in _grouping.group(ids, 3)] == [torch.int64, torch.int64]


def test_more_rows_than_32_bits_count_are_refused() -> None:
    """E5: torch's grouped_mm takes int32 ends, which would wrap to negative ones."""
    products = grouped_mm.GroupedProducts(torch.empty(3, dtype=torch.int64, device="meta"))
    rows, matrices = (torch.empty(s, dtype=torch.bfloat16, device="meta") for s in ((2**31, 8), (2, 8, 8)))
    for product in (products.rows, products.rows_back):
        with pytest.raises(executors.Unsupported, match=r"^T\*K=2147483648 slots: must be at most 2147483647"):
            product(rows, matrices)
    with pytest.raises(executors.Unsupported, match="slots"):
        products.outer(rows, rows)
    assert products.rows(rows[1:], matrices).shape == (2**31 - 1, 8)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def gpu_inputs_without_host(seed: int = 0) -> Inputs:
    """A bf16 problem on a GPU on which torch's grouped_mm reads its offsets by itself."""
    problem = replace(
        EVERYTHING, tokens=256, hidden=64, intermediate=32, dtype="bfloat16", lora_dtype="bfloat16", seed=seed
    )
    inputs = to_torch(problem, build(problem), "cuda")
    note = executors.get("grouped_mm").note(inputs.x, inputs.weights)
    if note:
        pytest.skip(note)
    return inputs


def step(inputs: Inputs) -> torch.Tensor:
    for leaf in inputs.tensors().values():
        leaf.grad = None
    y = call(executors.get("grouped_mm"), inputs)
    y.backward(inputs.dy)
    return y


@needs_gpu
def test_grouped_mm_never_waits_for_the_gpu() -> None:
    inputs = gpu_inputs_without_host()
    step(inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_grouped_mm_is_captured_and_replayed() -> None:
    """A CUDA graph of forward and backward, replayed on other inputs, gives the bits of an eager call."""
    captured, other = gpu_inputs_without_host(), gpu_inputs_without_host(seed=1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(captured)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step(captured)
    with torch.no_grad():
        for name, leaf in captured.tensors().items():
            leaf.copy_(other.tensors()[name])
        captured.dy.copy_(other.dy)
        captured.weights.selection_bias.copy_(other.weights.selection_bias)
    graph.replay()
    assert torch.equal(y, step(other))
    for name, leaf in captured.tensors().items():
        assert torch.equal(leaf.grad, other.tensors()[name].grad), name
