"""What the Triton kernels take when they are compiled for GPUs: no spills, tensor cores, wide loads. Needs no GPU."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from executors._cli.app import app
from executors._triton import configs
from executors._triton.inspect.disassembly import Instruction, disassemble_amd
from executors._triton.inspect.lanes import uneven_sums
from executors._triton.inspect.resources import inner_loop

PRODUCTS = {"up", "down", "inner", "outer"}
OTHERS = {
    "route",
    "route_backward",
    "group",
    "count",
    "scan",
    "place",
    "combine",
    "dz",
    "input_weights",
    "sums",
    "decode",
}
KERNELS = PRODUCTS | OTHERS  # but for those that fp16 alone has
DTYPES = {
    "sm80": ("bfloat16", "float32"),
    "sm90": ("bfloat16", "float32"),
    "sm100": ("bfloat16", "float32"),
    "gfx942": ("bfloat16", "float32"),
}
TENSOR_CORES = {"sm80": "HMMA", "sm90": "HGMMA", "sm100": "UTCHMMA", "gfx942": "v_mfma"}
SMALL = {"sm90": "HMMA", "sm100": "HMMA"}  # for fewer than 64 rows

PER_WEIGHT = {"sm80": 21, "sm90": 11, "sm100": 11, "gfx942": 20}  # instructions of a thread at most
# On gfx942, of kernels of 4 bits, which take more addresses, and of TF32, which keeps a NaN of every operand: moved to
# vector registers, no spill.
SCALARS_MOVED = 48
SLOW = {
    ("sm80", "bfloat16"),  # compiled and executed in tests/ptx on every run
    ("sm100", "bfloat16"),
    ("sm100", "float16"),
    ("sm100", "float32"),
    ("sm75", "float16"),
    ("sm80", "float32"),
    ("sm90", "bfloat16"),
    ("gfx942", "bfloat16"),
    ("sm90", "float16"),
    ("sm90", "float32"),
    ("gfx942", "float32"),
}  # compiled every night
WHOLE = {"sm90"}  # with every configuration; of the others the largest tiles, the nearest to their limits

Row = dict[str, Any]


def run(*arguments: str, interpreted: bool = False) -> subprocess.CompletedProcess[str]:
    """In a process of its own: where kernels are interpreted, as they may be in this one, none is compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    environment |= {"TRITON_INTERPRET": "1"} if interpreted else {}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        pytest.param(*case, marks=[pytest.mark.nightly] if case in SLOW else [])
        for case in (
            *((target, dtype) for target in DTYPES for dtype in DTYPES[target]),
            *((target, "float16") for target in ("sm75", "sm90", "sm100")),
        )
    ],
)
def test_kernels_fit(target: str, dtype: str, tmp_path: Path) -> None:
    """Fp16 is another case: what stands between its kernels is fp32 (E7)."""
    whole = target in WHOLE and dtype in DTYPES[target]
    path = tmp_path / "kernels.json"
    some = [] if whole else ["--largest"]
    done = run("-m", "executors", "kernels", "--target", target, "--dtype", dtype, *some, "--json", str(path))
    assert path.exists(), done.stderr
    found = json.loads(path.read_text())["targets"][target]
    rows = found["kernels"]
    faults = [*wrong_sizes(rows, found["shared"]), *wrong_instructions(target, rows), *narrow_loads(target, rows)]
    faults += [*slow_decoding(target, rows), *fused_scales(rows)]
    faults += [*uneven(rows), *truncated(rows)]
    if dtype == "bfloat16" and not any(row["kernel"] == "decode" and is_nested(row) for row in rows):
        faults.append("decode must be compiled with nested scales")
    if whole:
        faults += not_compiled(dtype, found["family"], rows)
    assert not faults, f"for {target} and {dtype}:\n" + "\n".join(faults)
    assert done.returncode == 0, done.stderr
    assert f"{target}: {len(rows)} kernels" in done.stdout
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 80


def name(row: Row) -> str:
    tile = "x".join(map(str, row["tile"]))
    stages = row["constants"].get("num_stages", "")
    return f"{row['kernel']} {tile}, {row['warps']} warps, {stages} stages ({row['layer']}, {row['dtype']})"


def wrong_sizes(rows: list[Row], shared: int) -> Iterator[str]:
    """Registers that did not suffice, or shared memory."""
    for row in rows:
        if row["spilled"] or row["local"]:
            yield f"{name(row)}: spills {row['spilled']} bytes in {row['local']} instructions, but must spill none"
        most = SCALARS_MOVED if row["constants"].get("FORMAT") or row["dtype"] == "tf32" else 0
        if row["scalars_moved"] > most and row["kernel"] in PRODUCTS - {"inner"} and not row["layer"].startswith("odd"):
            yield f"{name(row)}: {row['scalars_moved']} scalar registers too many, but must be at most {most}"
        if row["shared"] > shared:
            yield f"{name(row)}: {row['shared']} bytes of shared memory, but must be at most {shared}"


def wrong_instructions(target: str, rows: list[Row]) -> Iterator[str]:
    """Products that do without tensor cores, or with older ones; fp32 that is rounded to less."""
    for row in rows:
        if row["kernel"] not in PRODUCTS:
            continue
        kind, own = row["tensor_core_kind"], TENSOR_CORES.get(target, "")  # Triton has none before 8.0
        if row["tile"][0] < 64 or row["dtype"] == "tf32":
            own = SMALL.get(target, own) if kind in ("", SMALL.get(target)) else own
        if row["dtype"] == "float32" and target != "gfx942":
            own = ""  # those of AMD have fp32
        if row["kernel"] == "inner" and row["layer"] in ("lora-fp32", "nf4-peft") and row["dtype"] == "float16":
            # In fp32, beside bf16 in three terms. Triton takes TF32 on sm100 although told not to (docs/triton.md).
            own = "UTCHMMA" if target == "sm100" else ""
        if kind != own:
            yield f"{name(row)}: multiplies with {kind or 'no tensor cores'}, but must with {own or 'none'}"


def narrow_loads(target: str, rows: list[Row]) -> Iterator[str]:
    """Aligned operands that are not loaded 16 bytes at a time in the loop over k, or not all of them there."""
    for row in rows:
        if row["kernel"] not in PRODUCTS or row["layer"].startswith("odd") or row["dtype"] == "tf32":
            continue  # TF32 may turn a tile round
        if row["constants"].get("BLOCK_R") and row["kernel"] != "outer":
            continue  # the innermost loop is that over the rank; without it the kernel is the same
        if row["constants"].get("FORMAT"):
            yield from narrow_codes(target, row)
            continue
        loads, wide, expected = row["inner_loads"], row["inner_wide_loads"], operand_loads(target, row)
        if wide != expected or loads - wide > narrow_at_most(target, row):
            yield f"{name(row)}: {loads} loads in the loop over k, {wide} of them wide; must be {expected} wide"


def is_nested(row: Row) -> bool:
    return bool((row["constants"].get("FORMAT") or {}).get("nested"))


def fused_scales(rows: list[Row]) -> Iterator[str]:
    """Nested scales whose product and sum are rounded once (Q3): what the interpreter cannot show."""
    for row in filter(is_nested, rows):
        if row["constants"]["enable_fp_fusion"]:
            yield f"{name(row)}: must be compiled without contraction"
        if row["kernel"] == "decode" and row["multiply_adds"]:
            yield f"{name(row)}: {row['multiply_adds']} fused multiply-adds, but must have none"


def uneven(rows: list[Row]) -> Iterator[str]:
    """Sums over lanes in which a product is fused, so that lanes differ in the last bit (C1)."""
    for row in rows:
        if row["uneven_sums"]:
            yield f"{name(row)}: {row['uneven_sums']} sums over lanes with a fused product, but must have none"


def truncated(rows: list[Row]) -> Iterator[str]:
    """Operands that go into a product of TF32 without being rounded (ADR 14): what the interpreter cannot show."""
    for row in rows:
        if row["unrounded_operands"]:
            yield f"{name(row)}: {row['unrounded_operands']} operands of TF32 are truncated, but must be rounded"


def slow_decoding(target: str, rows: list[Row]) -> Iterator[str]:
    """Decoding that takes more instructions than it took when it was written; its figures are in docs/four-bit.md."""
    aligned = [row for row in rows if row["instructions_per_weight"] and not row["layer"].startswith("odd")]
    if not aligned:
        yield "no kernel decodes 4 bits"
    for row in aligned:
        each = row["instructions_per_weight"]
        if row["dtype"] == "bfloat16" and each > PER_WEIGHT[target]:
            yield f"{name(row)}: {each:.1f} instructions for each weight, must be at most {PER_WEIGHT[target]}"


def narrow_codes(target: str, row: Row) -> Iterator[str]:
    """Codes that are not loaded several bytes at a time, or rows beside them that are not loaded widely."""
    rows = wide_loads(target, row, row["constants"]["BLOCK_M"])
    narrow, most = row["inner_loads"] - row["inner_wide_loads"], 11  # scales, and codes where 16 bytes are too many
    if row["inner_wide_loads"] < rows or narrow > most:
        loads = f"{row['inner_loads']} loads in the loop over k, {row['inner_wide_loads']} of them wide"
        yield f"{name(row)}: {loads}; must be at least {rows} wide, and at most {most} narrow"


def narrow_at_most(target: str, row: Row) -> int:
    """How many narrow loads there may be: of slots, their weights, and operands with too little for all threads."""
    constants = row["constants"]
    if row["kernel"] != "outer":
        return 0
    gathered = sum(constants[f"TOP_K_{operand}"] > 0 or constants[f"SCALED_{operand}"] for operand in "AB")
    scaled = constants["SCALED_A"] or constants["SCALED_B"]
    each = 4 if target in ("gfx942", "sm75") else 1  # where loads are not pipelined, threads load slots for themselves
    return each * (gathered + scaled) + sum(wide_loads(target, row, size) == 0 for size in row["tile"][:2])


def wide_loads(target: str, row: Row, columns: int) -> int:
    """How many loads of 16 bytes bring so many columns of an operand; 0 if they are too few for all threads."""
    threads = row["warps"] * (64 if target == "gfx942" else 32)
    size = 4 if row["dtype"] == "float32" else 2
    return int(columns * row["constants"]["BLOCK_K"] * size // (16 * threads))


def operand_loads(target: str, row: Row) -> int:
    """How many loads of 16 bytes, or of a tile by TMA, bring both operands of one step."""
    constants = row["constants"]
    rows = wide_loads(target, row, constants["BLOCK_M"])
    if not constants.get("TMA"):
        return rows + wide_loads(target, row, constants["BLOCK_N"])
    if row["kernel"] == "down":
        return 2
    return rows + (2 if constants["LAYOUT"] == "concatenated" else 1)


def not_compiled(dtype: str, family: str, rows: list[Row]) -> Iterator[str]:
    """Kernels and shipped configurations that the cases leave out; those in fp32 are of some kernels only."""
    for kernel in KERNELS - {row["kernel"] for row in rows} if dtype == "bfloat16" else ():
        yield f"{kernel}: must be compiled"
    whole = configs.FAMILIES[family]
    for own in (whole, whole.packed):
        aligned, packed = own.wide if dtype == "float32" else own.narrow, own is whole.packed
        for kernel_configs, odd in ((aligned, False), (own.odd, True)):
            compiled = {
                (row["kernel"], *row["tile"], row["warps"], row["constants"]["num_stages"])
                for row in rows
                if row["kernel"] in PRODUCTS
                and row["dtype"] == dtype
                and row["layer"].startswith("odd") == odd
                and bool(row["constants"].get("FORMAT")) == packed
            }
            shipped = {
                (kernel, *getattr(config, field)[:5])
                for config in kernel_configs
                for field, kernel in (("up", "up"), ("dh", "up"), ("down", "down"), ("dx", "down"), ("outer", "outer"))
                if field != "outer" or not packed  # what is in 4 bits has no gradient
            }
            yield from (
                f"{dtype}, {'odd' if odd else 'aligned'}{', 4 bits' if packed else ''}: {tile} must be compiled"
                for tile in shipped - compiled
            )


def good_rows() -> list[Row]:
    """As they come from the command, of one product."""
    constants = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "TMA": "", "num_stages": 3}
    row = {"kernel": "down", "layer": "qwen3", "dtype": "bfloat16", "tile": [128, 128, 64], "warps": 8}
    sizes = {"spilled": 0, "local": 0, "scalars_moved": 0, "shared": 65536, "tensor_core_kind": "HMMA"}
    return [row | sizes | {"constants": constants, "inner_loads": 8, "inner_wide_loads": 8}]


def faults_of(target: str, changes: Row) -> list[str]:
    rows = [row | changes for row in good_rows()]
    return [*wrong_sizes(rows, 65536), *wrong_instructions(target, rows), *narrow_loads(target, rows)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spilled": 8}, "must spill none"),
        ({"local": 1}, "must spill none"),
        ({"scalars_moved": 1}, "scalar registers too many"),
        ({"shared": 65537}, "must be at most 65536"),
        ({"tensor_core_kind": ""}, "must with HMMA"),
        ({"dtype": "float32", "inner_loads": 16, "inner_wide_loads": 16}, "multiplies with HMMA, but must with none"),
        ({"inner_wide_loads": 4}, "8 loads in the loop over k, 4 of them wide; must be 8 wide"),
        ({"inner_loads": 4, "inner_wide_loads": 4}, "must be 8 wide"),
    ],
)
def test_planted_fault_is_found(changes: Row, message: str) -> None:
    assert faults_of("sm80", {}) == []
    (fault,) = faults_of("sm80", changes)
    assert message in fault


def test_older_tensor_cores_are_found() -> None:
    assert faults_of("sm90", {"tensor_core_kind": "HGMMA"}) == []
    assert "must with HGMMA" in faults_of("sm90", {})[0]


PLANTED = """
from executors._cli.kernels import KernelRow
from executors._triton.inspect import cases as _cases
from executors._triton import configs
from executors._triton.inspect.compile import compiling
from executors._triton.inspect.resources import resources_of

tile = configs.Tile({tile})
family = configs.FAMILIES["sm80"]
configs.FAMILIES["sm80"] = family._replace(narrow=(configs.KernelConfig(configs.ANY, *[tile] * 6),))
with compiling("sm80") as launches:
    next(_cases.cases("sm80", ("bfloat16",))).run()
found = [launch.compiled for launch in launches]
print([KernelRow(None, resources).faults(family.shared) for resources in resources_of(found)])
"""


@pytest.mark.parametrize(
    ("tile", "message"),
    [("128, 256, 64, 4, 3", "instructions move them"), ("128, 128, 64, 8, 8", "bytes of shared memory, of 166912")],
)
def test_bad_configuration_is_found(tile: str, message: str) -> None:
    done = run("-c", PLANTED.format(tile=tile))
    assert done.returncode == 0, done.stderr
    assert message in done.stdout


def test_innermost_loop_that_multiplies() -> None:
    waits = [Instruction("SYNCS"), Instruction("BRA", 3)]  # at 3 and 4: the shortest loop, without a product
    code = [Instruction("LDG.E"), Instruction("LDGSTS.E.BYPASS.128"), Instruction("HMMA.16816"), *waits]
    code += [Instruction("BRA", 1), Instruction("BRA", 1), Instruction("STG.E"), Instruction("BRA", 0)]
    assert inner_loop(code) == code[1:7]
    assert inner_loop(code[3:5]) == []


@pytest.mark.parametrize(
    ("assembly", "found"),
    [
        (("SHFL.BFLY PT, R9, R5, 0x8, 0x1f", "FFMA R10, R18.reuse, R7, R9"), 1),
        (("SHFL.BFLY PT, R9, R5, 0x8, 0x1f", "FFMA R10, R9, R7, R5"), 0),  # a product of what was sent
        (("SHFL.BFLY PT, R9, R5, 0x8, 0x1f", "FADD R9, R5, R9", "FFMA R10, R18, R7, R9"), 0),
        (("SHFL.BFLY PT, R9, R5, 0x8, 0x1f", "MOV R3, R9", "FFMA R10, R18, R7, R3"), 1),
        (("SHFL.BFLY PT, R9, R5, 0x8, 0x1f", "DFMA R10, R18, R6, R8"), 1),  # R9 is its upper half
        (("SHFL.BFLY PT, R9, R5, 0x8, 0x1f", "STG.E [R92.64], R9", "FFMA R10, R18, R7, -R9"), 1),
        (("v_mov_b32_dpp v3, v2 row_shr:8", "v_fmac_f32_e32 v3, v4, v5"), 1),
        (("ds_bpermute_b32 v3, v1, v2", "v_fma_f32 v0, v4, v5, v3"), 1),
        (("v_mov_b32_dpp v3, v2 row_shr:8", "v_add_f32_e32 v3, v2, v3", "v_fmac_f32_e32 v3, v4, v5"), 0),
        (("ds_bpermute_b32 v3, v1, v2", "v_pk_fma_f32 v[0:1], v[4:5], v[6:7], v[2:3]"), 1),
    ],
)
def test_sums_whose_lanes_differ(assembly: tuple[str, ...], found: int) -> None:
    split = [line.partition(" ")[::2] for line in assembly]
    assert uneven_sums([Instruction(op, None, tuple(rest.split(", "))) for op, rest in split]) == found


def test_assembly_for_amd_is_read() -> None:
    loop = ".LBB0_1: ; loop\n\ts_nop 0\n\tv_mfma_f32 v[0:3] ; x\n\ts_cbranch_scc0 .LBB0_1\n"
    text = f"kernel:\n{loop}\ts_endpgm\n.Lfunc_end0:\n\tno"
    branch, end = Instruction("s_cbranch_scc0", 0, (".LBB0_1",)), Instruction("s_endpgm")
    multiplication = Instruction("v_mfma_f32", None, ("v[0:3]",))
    assert disassemble_amd(text) == [Instruction("s_nop", None, ("0",)), multiplication, branch, end]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "sm91"), "--target sm91: must be one of sm75, sm80, sm86, sm90, sm100, gfx942"),
        (("--dtype", "int8"), "--dtype int8: must be one of bfloat16, float16, float32, all"),
        (("--target", "sm75", "--dtype", "bfloat16"), "--dtype bfloat16: sm75 has none"),
        (("--json", "no/such/folder/file"), "--json no/such/folder/file: must be in a folder that exists"),
    ],
)
def test_bad_arguments_are_refused(arguments: tuple[str, ...], message: str) -> None:
    result = CliRunner().invoke(app, ["kernels", *arguments])
    assert (result.exit_code, result.stderr) == (2, f"error: {message}\n")


def test_interpreted_kernels_are_refused() -> None:
    done = run("-m", "executors", "kernels", interpreted=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: kernels are interpreted in this process: TRITON_INTERPRET must be unset")
    assert len(done.stderr.strip().splitlines()) == 1


def test_missing_triton_is_refused(tmp_path: Path) -> None:
    (tmp_path / "triton.py").write_text("raise ModuleNotFoundError('No module named triton', name='triton')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv[1:] = ['kernels']; "
    done = run("-c", code + "from executors.__main__ import main; main()")
    assert (done.returncode, done.stderr) == (2, 'error: kernels need triton: pip install "moe-ref[triton]"\n')
