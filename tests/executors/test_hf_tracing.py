"""Models on `executors.hf` under torch.compile, torch.export, generation and activation checkpoints."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import create_selective_checkpoint_contexts

pytest.importorskip("transformers", reason="the extra moe-ref[hf]")

from transformers import PreTrainedModel

import executors.hf
import families
from family_errors import Results, run_model
from family_sizes import EXPERTS, HIDDEN, VOCAB

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("mixtral", "gpt_oss", "qwen3_moe")
each = pytest.mark.parametrize("name", NAMES)


def build(name: str, executor: str = "") -> PreTrainedModel:
    model = families.build(families.named(name))
    if executor:
        executors.hf.use(model, executor)
    return model


def experts_of(name: str, executor: str = "") -> nn.Module:
    (module, *_) = families.experts_of(build(name, executor), families.named(name)).values()
    return module


def slots(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(tokens)
    weights, ids = torch.rand(tokens, EXPERTS, generator=made).topk(2)
    return torch.randn(tokens, HIDDEN, generator=made), ids, weights


def compiled(module: nn.Module, graphs: list[torch.fx.GraphModule], **options: Any) -> Any:
    def backend(graph: torch.fx.GraphModule, _example: object) -> object:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    return torch.compile(module, backend=backend, fullgraph=True, **options)


@pytest.mark.parametrize(
    ("name", "executor"),
    [
        ("mixtral", "native"),
        ("gpt_oss", "native"),
        ("nemotron_h", "native"),
        ("mixtral", "auto"),
        ("gpt_oss", "grouped_mm"),
    ],
)
def test_experts_are_one_graph_for_all_numbers_of_tokens(name: str, executor: str) -> None:
    module, graphs = experts_of(name, executor), []
    traced = compiled(module, graphs, dynamic=True)
    for tokens in (12, 7, 33):
        assert torch.equal(traced(*slots(tokens)), module(*slots(tokens)))
    assert len(graphs) == 1


def test_a_model_is_one_graph() -> None:
    """With its gradients."""
    model, graphs = build("mixtral", "native"), []
    expected = run_model(model)
    model.zero_grad()
    traced = compiled(model, graphs)
    ids = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
    logits = traced(input_ids=ids).logits
    torch.testing.assert_close(logits, expected.output)
    logits.sum().backward()
    assert len(graphs) == 1
    for module in families.experts_of(model, families.named("mixtral")).values():
        assert all(parameter.grad.any() for parameter in module.parameters())


def test_the_first_call_says_what_to_do() -> None:
    """A gate is found by its values, which a tracer has not."""
    executors.hf.register("native")
    module = experts_of("mixtral")
    module.config._experts_implementation = "moe_native"
    traced = compiled(module, [])
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"switch it by executors\.hf\.use\(model\)"):
        traced(*slots(7))
    module(*slots(7))
    torch._dynamo.reset()
    assert torch.equal(traced(*slots(7)), module(*slots(7)))


@each
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own look at views
def test_a_first_call_without_fullgraph_works(name: str) -> None:
    executors.hf.register("native")
    module = experts_of(name)
    module.config._experts_implementation = "moe_native"
    torch._dynamo.reset()
    traced = torch.compile(module, backend="eager")
    assert torch.equal(traced(*slots(7)), module(*slots(7)))


@each
def test_experts_are_exported(name: str) -> None:
    module = experts_of(name, "native")
    tokens = torch.export.Dim("tokens", min=2)
    shapes = ({0: tokens}, {0: tokens}, {0: tokens})
    exported = torch.export.export(module, slots(12), dynamic_shapes=shapes, strict=False)
    assert "moe_ref.native" in str(exported.graph)
    for count in (12, 33):
        assert torch.equal(exported.module()(*slots(count)), module(*slots(count)))


@pytest.mark.parametrize("strict", [False, True])
def test_a_first_call_under_export(strict: bool) -> None:
    """A strict export is Dynamo's, which says what to do."""
    executors.hf.register("native")
    module = experts_of("gpt_oss")
    module.config._experts_implementation = "moe_native"
    if strict:
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"switch it by executors\.hf\.use\(model\)"):
            torch.export.export(module, slots(12), strict=True)
    else:
        exported = torch.export.export(module, slots(12), strict=False)
        assert torch.equal(exported.module()(*slots(12)), module(*slots(12)))


def test_a_first_call_without_values() -> None:
    """On fake tensors, as tools have that only ask for shapes."""
    executors.hf.register("native")
    module = experts_of("gpt_oss")
    module.config._experts_implementation = "moe_native"
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = module(*map(mode.from_tensor, slots(12)))
    assert y.shape == (12, HIDDEN)
    assert module._moe_ref_config == executors.hf.use(module).layers[0].config


@each
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_gives_the_same_tokens(name: str, cache: str) -> None:
    tokens = []
    for executor in ("", "native"):
        model = build(name, executor)
        ids = torch.randint(VOCAB, (2, 5), generator=torch.Generator().manual_seed(3))
        made = model.generate(ids, max_new_tokens=9, do_sample=False, cache_implementation=cache, use_cache=True)
        tokens.append(made)
        assert model.config._experts_implementation == ("moe_native" if executor else "eager")
    assert torch.equal(*tokens)
    assert tokens[0].shape == (2, 14)


CHECKPOINTS: dict[str, dict[str, Any]] = {
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "policy": {
        "use_reentrant": False,
        "context_fn": partial(create_selective_checkpoint_contexts, executors.checkpoint_policy),
    },
}


@each
@pytest.mark.parametrize("how", CHECKPOINTS)
def test_activation_checkpoints_change_nothing(name: str, how: str) -> None:
    expected = trained(build(name, "native"))
    model = build(name, "native")
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=CHECKPOINTS[how])
    seen: list[nn.Module] = []
    for module in families.experts_of(model, families.named(name)).values():
        module.register_forward_pre_hook(lambda own, _: seen.append(own))
    found = trained(model)
    assert len(seen) == 4  # each of two, and its replay
    assert torch.equal(found.output, expected.output)
    assert found.gradients.keys() == expected.gradients.keys()
    for key, gradient in expected.gradients.items():
        assert torch.equal(found.gradients[key], gradient), key


def trained(model: PreTrainedModel) -> Results:
    return run_model(model.train())
