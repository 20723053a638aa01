"""Strides, alignment, tensor descriptors and configurations of ``triton``."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

import executors
from executors._triton import configs as _configs
from executors._triton import device
from executors._triton.configs import FAMILIES, KernelConfig, config_of
from executors._triton.device import Device
from executors._triton.kernels import adapters, addresses, gradients, outer, packed, products, tiles
from executors._triton.kernels.addresses import offset
from executors._triton.launch import operands
from executors._triton.launch import products as _products
from executors._triton.launch.grouping import Groups
from executors._triton.launch.operands import LaunchPlan
from moe_ref import MoEConfig
from moe_ref.conformance.judgement.call import call, run
from moe_ref.conformance.judgement.checks import check_problem
from moe_ref.conformance.judgement.faults import same_bits
from moe_ref.conformance.problems.problem import Problem
from triton_cases import ALIGNED, DEVICE, GPT_OSS, inputs_of, interpreted


def both_ways(problem: Problem) -> dict[str, torch.Tensor]:
    """y and all gradients."""
    return run(executors.get("triton"), inputs_of(problem), backward=True).tensors


@interpreted
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize(
    ("activation", "dtype"), [("gpt-oss", "bfloat16"), ("concatenated", "float16"), ("plain", "bfloat16")]
)
def test_tensor_descriptors(activation: str, dtype: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What GPUs with TMA run, on sizes with tails: the same bits as with pointers."""
    configs = {"gpt-oss": GPT_OSS, "concatenated": MoEConfig(2), "plain": MoEConfig(2, activation="gelu")}
    problem = replace(ALIGNED, config=configs[activation], dtype=dtype, weights_layout=layout)
    pointers = both_ways(problem)
    monkeypatch.setitem(FAMILIES, "interpreter", FAMILIES["interpreter"]._replace(descriptors=True))
    used = []
    plain = _products.operand
    monkeypatch.setattr(_products, "operand", lambda *given: used.append(plain(*given)) or used[-1])
    check_problem(executors.get("triton"), problem, DEVICE)
    assert {own.tma for own in used} == {"columns", "rows"}  # one of them forward, the other backward
    for leaf, value in both_ways(problem).items():
        assert same_bits(value, pointers[leaf]), leaf


def test_alignment_of_weights() -> None:
    """Sizes and strides of whole 16 elements, one of the inner strides 1: else they are not aligned."""
    room = torch.zeros(2**14)
    assert operands.are_aligned(torch.zeros(2, 48, 32), torch.zeros(2, 32, 48).transpose(1, 2))
    assert operands.are_aligned(room.as_strided((1, 48, 32), (7, 32, 1)))
    odd = {
        "k is odd": torch.zeros(2, 48, 33),
        "m is odd": torch.zeros(2, 47, 32),
        "rows are odd": torch.zeros(2, 48, 33)[:, :, :32],
        "experts are odd": room.as_strided((2, 48, 32), (48 * 32 + 1, 32, 1)),
        "neither stride is 1": torch.zeros(2, 48, 64)[:, :, ::2],
        "begins in between": room[1:].as_strided((2, 48, 32), (48 * 32, 32, 1), 1),
    }
    assert [name for name, matrices in odd.items() if operands.are_aligned(matrices)] == []
    assert not operands.are_aligned(torch.zeros(2, 48, 32), odd["k is odd"])


def test_alignment_of_rows() -> None:
    """Rows that cannot be loaded widely are copied, other layouts are not."""
    x = torch.randn(5, 64)
    for same in (x, x[1:], x[:, :32], x[:1].expand(5, 64)):
        assert operands.readable(same, aligned=True) is same
    for odd in (x[:, ::2], x[:, 1:33], torch.randn(5, 33)[:, :32], torch.randn(64, 5).t()):
        assert operands.readable(odd, aligned=False) is odd
        copy = operands.readable(odd, aligned=True)
        assert copy.is_contiguous()
        assert copy.data_ptr() != odd.data_ptr()
        assert torch.equal(copy, odd)


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "transposed"])
@pytest.mark.parametrize("invariant", [False, True])
def test_weights_and_option_decide_on_the_configuration(
    layout: str, invariant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never the layout of x: a token's bits would depend on it (C2)."""
    asked = []
    plain = _configs.config_of
    monkeypatch.setattr(_configs, "config_of", lambda *a, **given: asked.append(given) or plain(*a, **given))
    call(executors.get("triton", batch_invariant=invariant), inputs_of(replace(ALIGNED, x_layout=layout)))
    assert asked == [{"narrow": True, "aligned": True, "rows": 16.0, "batch_invariant": invariant, "packed": False}]


def test_descriptors_are_for_nested_strides() -> None:
    """Each dimension outside of the next, in whole steps of it; the stride of a single expert does not count."""
    groups = Groups(torch.empty(0), torch.empty(0), torch.empty(0), 0)
    plan = LaunchPlan(groups, 2, FAMILIES["sm90"].narrow[0], Device("sm90", 132), "ieee", aligned=True)
    room = torch.zeros(2**16, dtype=torch.bfloat16)

    def kind(shape: tuple[int, ...], strides: tuple[int, ...]) -> str:
        return operands.operand(room.as_strided(shape, strides), 64, plan.config.up, plan).tma

    assert kind((2, 48, 32), (48 * 32, 32, 1)) == "rows"
    assert kind((2, 48, 32), (64 * 64, 64, 1)) == "rows"
    assert kind((2, 48, 32), (48 * 32, 1, 48)) == "columns"
    assert kind((1, 48, 32), (7, 32, 1)) == "rows"
    assert kind((2, 48, 32), (0, 32, 1)) == kind((2, 48, 32), (32, 64, 1)) == kind((2, 48, 32), (48 * 32, 16, 1)) == ""
    assert kind((2, 48, 32), (48 * 32 + 16, 32, 1)) == ""
    assert operands.operand(room.float().view(4, 128, 128), 64, plan.config.up, plan).tma == ""


def test_configurations_are_well_formed() -> None:
    for name, family in FAMILIES.items():
        packed = family.packed
        for kernel_configs in (family.narrow, family.wide, family.odd, packed.narrow, packed.wide, packed.odd):
            assert kernel_configs[-1].rows == float("inf"), name
            assert [r.rows for r in kernel_configs] == sorted({r.rows for r in kernel_configs}), name
            for config in kernel_configs:
                tiles = config._asdict()
                del tiles["rows"]
                assert {tile.block_m for product, tile in tiles.items() if product != "outer"} == {config.up.block_m}, (
                    name
                )
                for size in (size for tile in tiles.values() for size in tile[:3]):
                    assert size >= 16, name
                    assert size & (size - 1) == 0, name


def test_configuration_follows_rows_per_expert() -> None:
    few, some, many = FAMILIES["sm90"].narrow

    def chosen(rows: float, **changed: bool) -> KernelConfig:
        given = {"narrow": True, "aligned": True, "batch_invariant": False} | changed
        return config_of("sm90", rows=rows, **given)

    assert [chosen(rows) for rows in (0.1, 16, 16.5, 64, 65, 1e6)] == [few, few, some, some, many, many]
    assert chosen(1, narrow=False) == FAMILIES["sm90"].wide[0]
    assert chosen(1, aligned=False) == FAMILIES["sm90"].odd[0]
    packed = FAMILIES["sm90"].packed
    assert [chosen(rows, packed=True) for rows in (16, 64, 65)] == list(packed.narrow)
    assert chosen(1, packed=True, narrow=False) == packed.wide[0]
    assert chosen(1, packed=True, aligned=False) == packed.odd[0]
    assert {chosen(rows, batch_invariant=True) for rows in (0.1, 20, 1e6)} == {many}


@pytest.mark.parametrize(
    ("backend", "arch", "family"),
    [
        ("cuda", 75, "sm75"),
        ("cuda", 80, "sm80"),
        ("cuda", 89, "sm86"),
        ("cuda", 90, "sm90"),
        ("cuda", 100, "sm100"),
        ("cuda", 103, "sm100"),
        ("cuda", 120, "sm86"),
        ("hip", "gfx950", "gfx942"),
    ],
)
def test_every_device_has_configurations(backend: str, arch: int | str, family: str) -> None:
    assert _configs.family_of(backend, arch) == family


@interpreted
@pytest.mark.usefixtures("new_kernels")
def test_offsets_are_64_bit() -> None:
    """index * stride of two int32, past 2^31."""

    @triton.jit
    def kernel(out, index, stride):
        tl.store(out + tl.arange(0, 4), offset(index + tl.arange(0, 4), stride))

    out = torch.zeros(4, dtype=torch.int64)
    kernel[(1,)](out, 2**16, 2**16 + 8)
    assert out.tolist() == [(2**16 + i) * (2**16 + 8) for i in range(4)]
    kernel[(1,)](out, 3, 2**31 - 1)
    assert out.tolist() == [(3 + i) * (2**31 - 1) for i in range(4)]


def test_addresses_are_made_by_offset_only() -> None:
    """No kernel of products or gradients multiplies with a stride or a size by itself, but within a tile (E5)."""
    size = r"(?:\w*stride\w*|width\b|num_slots\b|OUTER\b|INNER\b|scales\[|[NKHMR]\b)"
    found = [
        line
        for module in (addresses, products, packed, tiles, adapters, gradients, outer)
        for line in re.findall(rf".*\*\s*{size}.*", Path(str(module.__file__)).read_text())
        if "offset(rows, 2 * N)" not in line and "< 2 * N)" not in line  # twice a size is no product of sizes
    ]
    assert [line.strip() for line in found] == [
        '"""index * stride in 64 bits, whatever the dtypes of the two (E5)."""',
        "return index.to(tl.int64) * stride",
        "z_rows = z + offset(row, N) + (tl.arange(0, BLOCK_M) * N)[:, None]",
    ]


@interpreted
@pytest.mark.parametrize("transposed", [False, True])
def test_strides_past_32_bits(transposed: bool, tmp_path: Path) -> None:
    """x, dy and parameters lie spread over 2^32 numbers of a file that is all holes: nothing is allocated (E5)."""
    dtypes = {"bias_dtype": "bfloat16", "lora_dtype": "bfloat16"}
    sizes = {"tokens": 5, "experts": 3, "hidden": 32, "intermediate": 16, "gate_up_rank": 4, "down_rank": 3}
    problem = replace(ALIGNED, **sizes, **dtypes)
    inputs = inputs_of(problem)
    path = tmp_path / "holes"
    size = 2**32
    with path.open("wb") as file:
        file.truncate(2 * size)
    room = torch.from_file(str(path), shared=True, size=size, dtype=torch.bfloat16)

    def spread(value: torch.Tensor, start: int) -> torch.Tensor:
        """The same numbers; the first dimension far apart, so that the last entry lies past 2^31."""
        turned = transposed and value.ndim == 3
        inner = value.transpose(-1, -2).contiguous().transpose(-1, -2) if turned else value.contiguous()
        step = (2**32 - 2**20) // max(1, value.shape[0] - 1) // 16 * 16
        placed = room.as_strided(value.shape, (step, *inner.stride()[1:]), start)
        placed.copy_(value)
        return placed

    def far_rows(value: torch.Tensor, start: int) -> torch.Tensor:
        placed = room.as_strided(value.shape, ((2**32 - 2**20) // 4 // 16 * 16, 1), start)
        placed.copy_(value)
        return placed

    with torch.no_grad():
        x, dy = far_rows(inputs.x, 2**19), far_rows(inputs.dy, 2**19 + 2**10)
        parameters = inputs.weights.parameters().items()
        far = {name: spread(value, place * 2**15) for place, (name, value) in enumerate(parameters)}
    weights = inputs.weights.with_parameters({name: value.requires_grad_() for name, value in far.items()})
    given = replace(inputs, x=x.requires_grad_(), dy=dy, weights=weights)
    near = run(executors.get("triton"), inputs, backward=True).tensors
    for leaf, value in run(executors.get("triton"), given, backward=True).tensors.items():
        assert same_bits(value, near[leaf]), leaf


@pytest.mark.parametrize(
    ("version", "capability", "taken"),
    [("3.6.0", 0, False), ("3.7.0+git", 0, False), ("3.7.1", 0, True), ("3.6.0", 1, True)],
)
def test_a_compiler_that_lacks_a_fence_is_refused(
    monkeypatch: pytest.MonkeyPatch, version: str, capability: int, taken: bool
) -> None:
    """On compute capability 9.0, Triton before 3.7.1 lets tensor cores read before copies have landed."""
    found = SimpleNamespace(major=(9, 8)[capability], minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: found)
    monkeypatch.setattr(triton, "__version__", version)
    make = device._gpu.__wrapped__
    if taken:
        assert make(torch.device("cuda")).multiprocessors == 132
    else:
        with pytest.raises(
            executors.Unavailable, match=r"^triton 3\.\S+ on compute capability 9\.0: must be 3\.7\.1 or later"
        ):
            make(torch.device("cuda"))
