"""`executors.hf.chunked_logprobs` against the plain formula: values and gradients, in float64 and in narrow dtypes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

pytest.importorskip("transformers", reason="the extra moe-ref[hf]")

import families
import peft_models
from executors.hf import chunked_logprobs
from family_errors import InFloat64

pytestmark = pytest.mark.usefixtures("one_thread")
VOCABULARY, HIDDEN = 37, 8
RULES: tuple[dict[str, Any], ...] = (
    {},
    {"scale": 0.25},
    {"softcap": 2.0},
    {"temperature": 0.7},
    {"scale": 3.0, "softcap": 1.5, "temperature": 1.3},
)
each_rule = pytest.mark.parametrize("rule", RULES, ids=str)


def drawn(dtype: torch.dtype = torch.float64, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """hidden [2, 5, H], weight, bias, labels with two that do not count."""
    made = torch.Generator().manual_seed(0)
    hidden, weight, own = (
        torch.randn(shape, generator=made, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((2, 5, HIDDEN), (VOCABULARY, HIDDEN), (VOCABULARY,))
    )
    labels = torch.randint(VOCABULARY, (2, 5), generator=made)
    labels[0, 0], labels[0, 1], labels[1, 4] = 0, VOCABULARY - 1, -100
    labels[1, 0] = -100
    return hidden, weight, own if bias else None, labels


def plain(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    logits = functional.linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    found = torch.log_softmax(logits / temperature, -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return torch.where(labels == -100, 0, found)


def gradients(y: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)))


@each_rule
@pytest.mark.parametrize("chunk", [1, 7, 36, 37, 4096])
def test_the_plain_formula_in_float64(rule: dict[str, Any], chunk: int) -> None:
    hidden, weight, bias, labels = drawn()
    y = chunked_logprobs(hidden, weight, labels, bias=bias, chunk=chunk, **rule)
    expected = plain(hidden, weight, bias, labels, **rule)
    assert (y.shape, y.dtype) == ((2, 5), torch.float64)
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
    assert y[labels == -100].tolist() == [0, 0]
    leaves = (hidden, weight, bias)
    for actual, wanted in zip(gradients(y, *leaves), gradients(expected, *leaves), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-13)


def test_gradients_by_differences() -> None:
    hidden, weight, bias, labels = drawn()

    def run(*leaves: Tensor) -> Tensor:
        return chunked_logprobs(*leaves[:2], labels, bias=leaves[2], chunk=10, **RULES[-1])

    assert torch.autograd.gradcheck(run, (hidden, weight, bias))
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.autograd.grad(run(hidden, weight, bias).sum(), hidden, create_graph=True)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, at the first jvp
@pytest.mark.parametrize("transform", [torch.func.grad, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))])
def test_transforms_are_refused_in_one_line(transform: Callable[..., Callable[..., object]]) -> None:
    hidden, weight, _, labels = (value if value is None else value.detach() for value in drawn())
    with pytest.raises(RuntimeError, match=r"^chunked_logprobs: torch\.func and forward mode are not supported; use"):
        transform(lambda x: chunked_logprobs(x, weight, labels).sum())(hidden)


@pytest.mark.parametrize("frozen", ["head", "hidden", "all"])
def test_what_is_frozen_has_no_gradient(frozen: str) -> None:
    hidden, _, _, labels = drawn()
    head = nn.Linear(HIDDEN, VOCABULARY, dtype=torch.float64).requires_grad_(frozen == "hidden")
    hidden = hidden.detach().requires_grad_(frozen == "head")
    y = chunked_logprobs(hidden, head, labels, chunk=10)
    torch.testing.assert_close(y, plain(hidden, head.weight, head.bias, labels), rtol=1e-13, atol=1e-13)
    assert y.requires_grad is (frozen != "all")
    if frozen == "all":
        return
    y.sum().backward()
    assert [hidden.grad is None, head.weight.grad is None, head.bias.grad is None] == (
        [False, True, True] if frozen == "head" else [True, False, False]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_dtypes(dtype: torch.dtype) -> None:
    """As a model's own logits, which are rounded to its dtype, in fp32 from there on."""
    leaves = drawn(dtype)
    hidden, weight, bias, labels = leaves
    y = chunked_logprobs(hidden, weight, labels, bias=bias, chunk=10)
    assert y.dtype == torch.float32
    logits = functional.linear(hidden, weight, bias).float()
    expected = torch.log_softmax(logits, -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(y, torch.where(labels == -100, 0, expected), rtol=1e-6, atol=1e-6)
    exact = [value.detach().double().requires_grad_() for value in leaves[:3]]
    found, wanted = gradients(y, *leaves[:3]), gradients(plain(*exact, labels), *exact)
    for actual, value in zip(found, wanted, strict=True):
        assert actual.dtype == dtype
        assert (actual.double() - value).norm() <= 4 * torch.finfo(dtype).eps * value.norm()


def test_autocast() -> None:
    """Products in autocast's dtype, as the plain formula has them; gradients in the parameters' own."""
    hidden, weight, bias, labels = drawn(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = chunked_logprobs(hidden, weight, labels, bias=bias, chunk=10)
        logits = functional.linear(hidden, weight, bias).float()
    expected = torch.log_softmax(logits, -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(y, torch.where(labels == -100, 0, expected), rtol=1e-6, atol=1e-6)
    assert {value.dtype for value in gradients(y, hidden, weight, bias)} == {torch.float32}


def test_the_backward_pass_has_the_forward_pass_s_products() -> None:
    """Whatever autocast is on when it runs."""
    hidden, weight, bias, labels = drawn(torch.float32)
    y = chunked_logprobs(hidden, weight, labels, bias=bias, chunk=10)
    expected = torch.autograd.grad(y.sum(), (hidden, weight, bias), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y.sum(), (hidden, weight, bias))
    assert all(torch.equal(actual, wanted) for actual, wanted in zip(found, expected, strict=True))


def test_logits_of_minus_infinity() -> None:
    """Tokens that a bias forbids."""
    hidden, weight, _, labels = drawn()
    bias = torch.zeros(VOCABULARY, dtype=torch.float64)
    bias[10:20] = -torch.inf
    labels = torch.where((labels >= 10) & (labels < 20), 3, labels)
    y = chunked_logprobs(hidden, weight, labels, bias=bias, chunk=5)
    torch.testing.assert_close(y, plain(hidden, weight, bias, labels), rtol=1e-13, atol=1e-13)
    assert all(value.isfinite().all() for value in gradients(y, hidden, weight))


def test_no_tokens() -> None:
    hidden, weight, _, labels = drawn()
    y = chunked_logprobs(hidden[:, :0], weight, labels[:, :0])
    assert y.shape == (2, 0)
    y.sum().backward()
    assert not weight.grad.any()


def test_the_logits_are_never_there() -> None:
    """Forward and backward, the head trained: no block is as large as what [B, T, V] takes."""
    hidden, labels = torch.randn(8, 64, 16, requires_grad=True), torch.randint(4096, (8, 64))
    head, whole = nn.Linear(16, 4096), 8 * 64 * 4096 * 4
    chunked = peft_models.largest_allocation(lambda: chunked_logprobs(hidden, head, labels, chunk=128).sum().backward())
    formed = peft_models.largest_allocation(lambda: plain(hidden, head.weight, head.bias, labels).sum().backward())
    assert chunked <= whole / 16 < whole <= formed


def test_a_model_s_own_loss() -> None:
    """The mean over tokens is transformers' loss, and the gradients of the body are the same."""
    model = families.build(families.named("mixtral")).double()
    ids = peft_models.ids()
    with InFloat64():
        model(input_ids=ids, labels=ids).loss.backward()
        wanted = {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None}
        loss = model(input_ids=ids, labels=ids).loss.detach()
        model.zero_grad()
        hidden = model.model(input_ids=ids).last_hidden_state
        y = chunked_logprobs(hidden[:, :-1], model.lm_head, ids[:, 1:], chunk=20)
        y.mean().neg().backward()
    assert abs(y.mean() + loss) < 1e-6  # transformers' loss is in fp32
    for key, value in model.named_parameters():
        if key in wanted:
            assert (value.grad - wanted[key]).norm() <= 1e-5 * wanted[key].norm() + 1e-9, key


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"head": nn.Embedding(3, 2)}, "head is a Embedding: must be a tensor [V, H] or a torch.nn.Linear, and no"),
        ({"head": torch.ones(4)}, "head.shape=(4,): must be (V, H), V at least 1"),
        ({"hidden": torch.ones(2, 5, 3)}, f"hidden.shape=(2, 5, 3): must be (..., {HIDDEN}), as the head's columns"),
        ({"hidden": torch.ones(2, 5, HIDDEN)}, "hidden.dtype=torch.float32: must be torch.float64, the head's"),
        ({"hidden": None}, "hidden=None: must be a torch.Tensor"),
        ({"labels": [3]}, "labels=[3]: must be a torch.Tensor"),
        ({"labels": torch.ones(2, 4)}, "labels.shape=(2, 4): must be (2, 5), hidden's but for H"),
        ({"labels": torch.ones(2, 5)}, "labels.dtype=torch.float32: must be torch.int64"),
        ({"labels": torch.full((2, 5), 37)}, "labels has 37: must be in [0, 37) or -100"),
        ({"labels": torch.full((2, 5), -1)}, "labels has -1: must be in [0, 37) or -100"),
        ({"bias": [0.0]}, "bias=[0.0]: must be a torch.Tensor"),
        ({"bias": torch.ones(3)}, "bias.shape=(3,): must be (37,), as the head's rows"),
        ({"head": nn.Linear(HIDDEN, 37), "bias": torch.ones(37)}, "bias: must be None with a torch.nn.Linear, which"),
        ({"chunk": 0}, "chunk=0: must be positive"),
        ({"chunk": 1.5}, "chunk=1.5: must be an int"),
        ({"chunk": "all"}, "chunk='all': must be an int"),
        ({"scale": torch.ones(())}, "scale=tensor(1.): must be a float or int"),
        ({"temperature": None}, "temperature=None: must be a float or int"),
        ({"temperature": torch.inf}, "temperature=inf: must be finite"),
        ({"temperature": 0.0}, "temperature=0.0: must be positive"),
        ({"softcap": -1.0}, "softcap=-1.0: must be positive"),
    ],
)
def test_refusals(changes: dict[str, Any], said: str) -> None:
    hidden, weight, _, labels = drawn()
    given = {"hidden": hidden, "head": weight, "labels": labels} | changes
    with pytest.raises((TypeError, ValueError)) as caught:
        chunked_logprobs(**given)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, within dynamo
def test_compiles_whole() -> None:
    """Labels out of range are seen when the graph runs."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    labels = torch.randint(0, 50, (7,))

    def loss(labels: torch.Tensor) -> torch.Tensor:
        return chunked_logprobs(hidden, weight, labels, chunk=13, softcap=5.0).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(labels), (hidden, weight))
    found = torch.autograd.grad(compiled(labels), (hidden, weight))
    assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))
    with pytest.raises(RuntimeError, match=r"labels: must be in \[0, 50\) or -100"):
        compiled(labels + 50)


def test_devices_are_compared_and_a_chunk_is_no_bool() -> None:
    hidden, weight, labels = torch.ones(2, 4), torch.ones(5, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"head\.device=meta: must be cpu, hidden's"):
        chunked_logprobs(hidden, weight.to("meta"), labels)
    with pytest.raises(ValueError, match=r"labels\.device=meta: must be cpu, hidden's"):
        chunked_logprobs(hidden, weight, labels.to("meta"))
    with pytest.raises(TypeError, match="chunk=True: must be an int"):
        chunked_logprobs(hidden, weight, labels, chunk=True)
