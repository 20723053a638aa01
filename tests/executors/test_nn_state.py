"""State dicts of executors.nn.Experts: their keys, strict loading, meta devices, files, and FSDP2."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import multiprocessing
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from executors import mxfp4, nf4
from executors.nn import Experts
from moe_ref.nf4 import decode
from nn_cases import KINDS, inputs, layer, slots

every_kind = pytest.mark.parametrize("kind", KINDS)


def same_state(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert list(first) == list(second)
    for key, value in first.items():
        assert value.dtype == second[key].dtype, key
        assert torch.equal(value, second[key]), key


def test_keys_are_those_of_bitsandbytes_and_of_gpt_oss() -> None:
    state = torch.nn.Sequential(Experts(layer("nf4"))).state_dict()
    dense = {f"0.{name}" for name in (*layer("nf4").parameters(), "selection_bias")}
    expected = {}
    for name, tensor in layer("nf4").packed().items():
        expected |= nf4.to_state_dict(tensor, f"0.{name}")
    same_state({key: value for key, value in state.items() if key not in dense}, expected)
    plain = layer("mxfp4", lora=None, selection_bias=None, expert_scale=None, post_expert_norm=None)
    same_state(dict(sorted(Experts(plain).state_dict().items())), dict(sorted(mxfp4.to_state_dict(plain).items())))


@every_kind
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_makes_another_module_the_same(kind: str, assign: bool) -> None:
    """Without assign in the module's own memory."""
    module, other = (torch.nn.Sequential(Experts(layer(kind, seed))) for seed in (0, 1))
    places = {name: value.data_ptr() for name, value in other.named_buffers()}
    assert str(other.load_state_dict(module.state_dict(), assign=assign)) == "<All keys matched successfully>"
    same_state(other.state_dict(), module.state_dict())
    x, logits = inputs()
    assert torch.equal(other[0](x, logits), module[0](x, logits))
    same_places = {name: value.data_ptr() for name, value in other.named_buffers()} == places
    assert same_places != assign


@every_kind
def test_a_module_on_meta_is_filled(kind: str) -> None:
    """Assigned, or copied into memory that to_empty has given."""
    state = Experts(layer(kind)).state_dict()
    x, logits = inputs()
    expected = Experts(layer(kind))(x, logits)
    shown = Experts(layer(kind).to("meta")).state_dict()
    assert {key: (value.dtype, value.device.type) for key, value in shown.items()} == {
        key: (value.dtype, "meta") for key, value in state.items()
    }
    assigned, copied = (Experts(layer(kind).to("meta"), frozen=True) for _ in range(2))
    assigned.load_state_dict(state, assign=True)
    copied.to_empty(device="cpu").load_state_dict(state)
    for module in (assigned, copied):
        assert torch.equal(module(x, logits), expected)
        assert not module.down_proj_bias.requires_grad


def test_meta_is_not_filled_by_copies() -> None:
    module, state = Experts(layer("nf4").to("meta")), Experts(layer("nf4")).state_dict()
    message = r"gate_up_proj is on the device meta: must be loaded with assign=True, or after to_empty"
    with pytest.warns(UserWarning, match="no-op"), pytest.raises(RuntimeError, match=message):
        module.load_state_dict(state)


@pytest.mark.parametrize("form", [{"nested": False}, {"nested": True, "blocksize": 128}, {"quant_type": "fp4"}])
def test_the_form_of_the_entries_counts(form: dict[str, Any]) -> None:
    """Another blocksize, plain statistics: the entries say so. The module's dtype and order of storage stay."""
    dense = layer("dense", seed=1)
    stored = replace(dense, gate_up_proj=dense.gate_up_proj.mT.contiguous().mT)
    module = Experts(nf4.quantize(stored, nested=True)).to(torch.bfloat16)
    source = nf4.quantize(replace(layer("dense"), gate_up_proj=layer("dense").gate_up_proj.mT.contiguous().mT), **form)
    module.load_state_dict(Experts(source).state_dict())
    for name, tensor in source.packed().items():
        found = module.weights.packed()[name]
        assert (found.blocksize, found.quant_type, found.dtype) == (tensor.blocksize, tensor.quant_type, "bfloat16")
        assert found.transposed == tensor.transposed == (name == "gate_up_proj")
        assert torch.equal(decode(found.to(dtype="float32")), decode(tensor))
    again = Experts(source)
    again.load_state_dict(module.state_dict())
    assert {value.data_ptr() for value in again.buffers()}.isdisjoint(
        v.data_ptr() for v in module.state_dict().values()
    )


def test_experts_with_their_own_nested_statistics_keep_their_numbers() -> None:
    """bitsandbytes' entries have one offset: such scales are written plain, which is exact (Q5)."""
    weights = layer("nf4")
    singles = [nf4.quantize_tensor(matrix, nested=True) for matrix in layer("dense").down_proj]
    state = {key: v for e, one in enumerate(singles) for key, v in nf4.to_state_dict(one, f"w.{e}").items()}
    joined = nf4.from_state_dict(state, "w.{}")
    assert joined.segments == len(singles)
    module = Experts(replace(weights, down_proj=joined))
    x, logits = inputs()
    expected = module(x, logits)
    module.load_state_dict(module.state_dict())
    assert module.weights.down_proj.nested_offset is None
    assert torch.equal(module(x, logits), expected)


def test_states_that_do_not_fit_are_refused() -> None:
    module, state = Experts(layer("nf4")), Experts(layer("nf4")).state_dict()
    without = {key: value for key, value in state.items() if not key.startswith("down_proj.") and key != "down_proj"}
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"down_proj\""):
        module.load_state_dict(without)
    assert module.load_state_dict(without, strict=False).missing_keys == ["down_proj"]
    with pytest.raises(RuntimeError, match=r"'gate_up_proj.absmax' is missing: must be there"):
        module.load_state_dict({key: value for key, value in state.items() if key != "gate_up_proj.absmax"})
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"down_projection\""):
        module.load_state_dict(state | {"down_projection": torch.zeros(1)})
    small = nf4.to_state_dict(nf4.quantize_tensor(torch.ones(5, 32, 64), nested=True), "down_proj")
    with pytest.raises(RuntimeError, match=r"size mismatch for down_proj: shape=\(5, 32, 64\): must be \(5, 32, 32\)"):
        module.load_state_dict(state | small)
    with pytest.raises(RuntimeError, match=r"gate_up_proj is not in 4 bits: must have one of"):
        module.load_state_dict(Experts(layer("dense")).state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key"):
        Experts(layer("dense")).load_state_dict(state)


@pytest.mark.parametrize("assign", [False, True])
def test_m1_bytes_are_never_cast(assign: bool) -> None:
    """A copy would make whole numbers of them. Scales may be stored in the dtype that means their powers of two."""
    module, x = Experts(layer("mxfp4")), inputs()
    expected, state = module(*x), Experts(layer("mxfp4", seed=1)).state_dict()
    for key, other, name in (
        ("gate_up_proj_blocks", state["gate_up_proj_blocks"].float(), "float32"),
        ("down_proj_scales", state["down_proj_scales"].view(torch.float8_e8m0fnu), "float8_e8m0fnu"),
    ):
        with pytest.raises(RuntimeError, match=rf"{key}\.dtype={name}: must be uint8\n?"):
            module.load_state_dict(module.state_dict() | {key: other}, assign=assign)
        assert torch.equal(module(*x), expected)


def test_r3_loading_never_rounds_the_selection_bias() -> None:
    weights = layer("dense")
    state, bias = Experts(weights).state_dict(), weights.selection_bias
    low = Experts(replace(weights, selection_bias=bias.bfloat16()))  # type: ignore[union-attr]
    wide = Experts(replace(weights, selection_bias=torch.zeros_like(bias)))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"selection_bias\.dtype=float32: must be bfloat16, or hold it exactly"):
        low.load_state_dict(state)
    wide.load_state_dict(low.state_dict())
    assert torch.equal(wide.selection_bias, low.selection_bias.float())
    low.load_state_dict(state, assign=True)
    assert torch.equal(low.selection_bias, bias)  # type: ignore[arg-type]


def test_another_form_spares_who_shares_the_memory() -> None:
    """The other module would read FP4's codes by NF4's table."""
    weights, source = layer("nf4"), nf4.quantize(layer("dense", seed=1), "fp4", nested=True)
    module, other = Experts(weights), Experts(weights)
    before = decode(other.weights.gate_up_proj)
    module.load_state_dict(Experts(source).state_dict())
    assert torch.equal(decode(other.weights.gate_up_proj), before)
    assert torch.equal(decode(module.weights.gate_up_proj), decode(source.gate_up_proj))


@every_kind
def test_files_hold_it(kind: str, tmp_path: Path) -> None:
    module, other = Experts(layer(kind)), Experts(layer(kind, seed=1))
    save_file(module.state_dict(), tmp_path / "experts.safetensors")
    other.load_state_dict(load_file(tmp_path / "experts.safetensors"))
    same_state(other.state_dict(), module.state_dict())


def shard_and_compare(rank: int, world: int, kind: str) -> None:
    """A sharded module against a whole one: outputs, gradients, states, an assignment from meta, mixed precision."""
    mesh = init_device_mesh("cpu", (world,))
    module, whole = Experts(layer(kind)), Experts(layer(kind))
    fully_shard(module, mesh=mesh)
    register_fsdp_forward_method(module, "experts")
    x, logits = (value[None] for value in inputs(seed=rank))  # no view comes out, though there are three dimensions
    y, expected = module(x, logits), whole(x, logits)
    assert torch.equal(y, expected)
    y += 1  # in place, as a residual stream may do: the hook that gathers for backward stays
    y.sum().backward()
    expected.sum().backward()
    for (name, ours), theirs in zip(module.named_parameters(), whole.parameters(), strict=True):
        dist.all_reduce(theirs.grad)
        torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad / world, msg=name)
    assert torch.equal(module.experts(x[0], **slots()), whole.experts(x[0], **slots()))
    options = StateDictOptions(full_state_dict=True)
    full = get_model_state_dict(module, options=options)
    if rank == 0:
        same_state(full, dict(whole.state_dict()))
    set_model_state_dict(module, dict(whole.state_dict()), options=options)
    empty = fully_shard(Experts(layer(kind).to("meta")), mesh=mesh)
    empty.to_empty(device="cpu").load_state_dict(module.state_dict())
    assert torch.equal(empty(x, logits), expected)
    low = layer(kind).with_parameters({n: t.to(dtype="bfloat16") for n, t in layer(kind).packed().items()})
    low = layer(kind) if kind == "mixed" else low  # a dense projection takes the other one along
    mixed = fully_shard(Experts(low), mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    assert mixed(x, logits).dtype == torch.bfloat16


def in_a_group(rank: int, world: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        for kind in KINDS if world > 1 else ("mixed", "nf4"):
            shard_and_compare(rank, world, kind)
    finally:
        dist.destroy_process_group()


def test_fsdp2_shards_what_learns(tmp_path: Path, one_thread: None) -> None:
    in_a_group(0, 1, str(tmp_path / "store"))


@pytest.mark.nightly
def test_fsdp2_shards_over_two_processes() -> None:
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(in_a_group, args=(2, f"{folder}/store"), nprocs=2)
