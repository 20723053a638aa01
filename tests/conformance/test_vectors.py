"""The vectors: every clause, the same bytes again, both forms alike, and what their judge accepts and rejects."""

import json
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from safetensors import safe_open

import clauses
import executors
import vector_digests
from executors import Capabilities, Executor
from moe_ref.conformance.__main__ import main
from moe_ref.conformance.honest import honest_variants
from moe_ref.conformance.judgement.checks import ConformanceError
from moe_ref.conformance.judgement.reference import reference_of
from moe_ref.conformance.mutants import mutants
from moe_ref.conformance.vectors.archive import write_archive
from moe_ref.conformance.vectors.cases import every_case
from moe_ref.conformance.vectors.folder import MANIFEST, arrays_of, write_vectors
from moe_ref.conformance.vectors.judging import check_vector
from moe_ref.conformance.vectors.layout import BadVectors, from_bytes, to_bytes
from moe_ref.conformance.vectors.reading import Folder, read_folder

CASES = every_case()
FEW = (  # one of each kind, and what is nasty
    *(
        "ties-softmax",
        "choices-sigmoid-max",
        "rows-softmax",
        "broken-sigmoid",
        "bias-small-logit",
        "expert-scale-broken",
    ),
    *(
        "empty-slots",
        "ids-past-32-bits",
        "duplicates",
        "clamp-at-equality-bfloat16",
        "wide-combine-float16",
        "no-tokens",
    ),
    *("gpt-oss-in-bf16", "weights-transposed", "leading-dimensions", "scale-input", "batch", "batch-part", "recompute"),
    *("norm-bias-adapters", "past-range-o", "dtypes-bfloat16", "layer-nf4-straddling", "layer-mxfp4-transposed"),
    *("layer-nf4-nested-per-expert", "layer-nf4-beside-dense", "decode-nested-not-fused", "quantize-fp4-ties"),
    *("refused-top-k-zero", "refused-down-proj-dtype", "rank-of-three-experts"),
)
INTERPRETED = ("empty-slots", "clamp-at-equality-bfloat16", "layer-nf4-straddling")
SIZE = 8_000_000  # bytes of a folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    path = tmp_path_factory.mktemp("vectors") / "few"
    write_vectors(path, {name: CASES[name] for name in FEW})
    return read_folder(path)


def test_every_clause_has_two_vectors() -> None:
    counted = Counter(clause for case in CASES.values() for clause in case.clauses)
    assert [clause for clause in clauses.clauses() if counted[clause] < 2] == []
    assert counted.keys() == set(clauses.clauses())


def test_inputs_ids_and_decoded_weights_are_what_they_were() -> None:
    """To the last bit; and all floats to 1e-10. A change on purpose: run python tests/support/vector_digests.py."""
    found, kept = vector_digests.digests(), vector_digests.kept()
    assert found.keys() == kept.keys()
    assert [name for name in found if found[name][0] != kept[name][0]] == []
    far = {name: found[name][1] - kept[name][1] for name in found if abs(found[name][1] - kept[name][1]) > 1e-10}
    assert far == {}


@pytest.mark.nightly
def test_every_mutant_breaks_a_vector(tmp_path: Path) -> None:
    write_vectors(tmp_path / "all", CASES)
    every = read_folder(tmp_path / "all")
    judged = [name for name, entry in every.entries.items() if entry["kind"] in ("layer", "experts", "route")]

    def rejected(mutant: Executor, case: str) -> bool:
        try:
            check_vector(mutant, every, case)
        except ConformanceError:
            return True
        except RuntimeError:  # a wrapper without a gradient
            return False
        return False

    wrong = mutants(executors.get("native"))
    assert [name for name, mutant in wrong.items() if not any(rejected(mutant, case) for case in judged)] == []


@pytest.mark.nightly
def test_all_of_them_are_small_and_pass(tmp_path: Path) -> None:
    write_vectors(tmp_path / "all", CASES)
    assert sum(path.stat().st_size for path in (tmp_path / "all").iterdir()) <= SIZE
    every = read_folder(tmp_path / "all")
    for name in executors.available():
        for case in every.entries:
            check_vector(executors.get(name), every, case)


def test_written_again_the_files_are_the_same(folder: Folder, tmp_path: Path) -> None:
    write_vectors(tmp_path / "few", {name: CASES[name] for name in FEW})
    for path in folder.path.iterdir():
        assert path.read_bytes() == (tmp_path / "few" / path.name).read_bytes(), path.name


def test_both_forms_hold_the_same(folder: Folder) -> None:
    for name in folder.entries:
        arrays = folder.arrays(name)
        with safe_open(folder.path / f"{name}.safetensors", framework="pt") as file:
            assert set(file.keys()) == set(arrays)
            said = json.loads(file.metadata()["case"])
            assert (said["name"], said["clauses"]) == (name, list(CASES[name].clauses))
            for key, value in arrays.items():
                read, mine = file.get_tensor(key), value.tensor()
                assert (read.dtype, read.shape) == (mine.dtype, mine.shape), f"{name} {key}"
                assert (
                    read.contiguous().numpy(force=True).tobytes() == mine.numpy(force=True).tobytes()
                    if (str(read.dtype) != "torch.bfloat16")
                    else bool((read.view(mine.short().dtype) == mine.view(mine.short().dtype)).all())
                )


def test_what_is_read_is_what_was_computed(folder: Folder) -> None:
    for name in ("broken-sigmoid", "layer-nf4-nested-per-expert", "dtypes-bfloat16"):
        vector, content = folder.vector(name), CASES[name].content
        numbers = content.numbers()
        assert vector.arrays is not None
        assert (vector.arrays.topk_ids == numbers.topk_ids).all()
        assert to_bytes(vector.stored) == to_bytes(arrays_of(CASES[name]))
        assert vector.problem is not None
        assert vector.problem.dtype_of("router_logits") == content.problem.routing_dtype
        assert vector.problem.frozen == content.problem.frozen
        dtypes = {key: (vector.problem.dtype, vector.problem.dtype_of(key)) for key in ("y", "x")}
        for key, bars in reference_of(content.problem, numbers).bars.items():
            if key in dtypes:
                assert vector.bars is not None
                assert (vector.bars[key].sd(*dtypes[key]) == bars.sd(*dtypes[key])).all()
                assert vector.bars[key].gain_sd(*dtypes[key]) == bars.gain_sd(*dtypes[key])
                assert vector.bars[key].rms_sd(*dtypes[key]) == bars.rms_sd(*dtypes[key])


@pytest.mark.parametrize("name", executors.available())
def test_every_executor_passes(folder: Folder, name: str) -> None:
    executor = executors.get(name)
    cases = INTERPRETED if executor.capabilities.interpreted else FEW
    reasons = {case: check_vector(executor, folder, case) for case in cases}
    assert sum(not reason for reason in reasons.values()) >= 2, reasons
    assert all("\n" not in reason for reason in reasons.values())


def test_a_batch_invariant_executor_is_held_to_it(folder: Folder) -> None:
    """C2: tokens alone have the bits that they have among others; native, which does not declare it, may differ."""

    class Declares:
        name, capabilities = "declares", Capabilities(batch_invariant=True)
        experts, check = executors.get("native").experts, executors.get("native").check
        asked = 0

        def __call__(self, x, router_logits, weights):
            return executors.get("native")(x, router_logits, weights) * (1 + 1e-7 * (len(x) == 3))

    with pytest.raises(ConformanceError, match="breaks C2"):
        check_vector(Declares(), folder, "batch-part")  # type: ignore[arg-type]


def test_recompute_is_held_to_the_same_bits(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """D4."""
    from executors.native import Native

    plain = Native.experts

    def other(self: Native, x, **arguments):
        return plain(self, x * (1 + 2.0**-20 * self.recompute), **arguments)

    check_vector(executors.get("native"), folder, "recompute")
    monkeypatch.setattr(Native, "__call__", _by_experts(other))
    with pytest.raises(ConformanceError, match="breaks D4"):
        check_vector(executors.get("native"), folder, "recompute")


def _by_experts(experts):
    def call(self, x, router_logits, weights):
        routing = self.route(router_logits, weights)
        return experts(self, x, topk_ids=routing.topk_ids, topk_weights=routing.topk_weights, weights=weights)

    return call


KILLED = {  # by which case each of these mutants is rejected
    "higher_id_wins_ties": "ties-softmax",
    "selection_bias_on_other_key": "bias-small-logit",
    "empty_slot_counts": "empty-slots",
    "nan_leaks_to_next_token": "broken-sigmoid",
    "ids_read_as_int32": "ids-past-32-bits",
}


@pytest.mark.parametrize("mutant", KILLED)
def test_a_wrong_executor_is_rejected(folder: Folder, mutant: str) -> None:
    with pytest.raises(ConformanceError):
        check_vector(mutants(executors.get("native"))[mutant], folder, KILLED[mutant])


@pytest.mark.parametrize("variant", ["fp32_throughout", "features_reversed", "weight_before_down_projection"])
def test_an_honest_variant_is_accepted(folder: Folder, variant: str) -> None:
    honest: Executor = honest_variants(executors.get("native"))[variant]
    for case in ("gpt-oss-in-bf16", "scale-input", "norm-bias-adapters", "dtypes-bfloat16", "broken-sigmoid"):
        assert check_vector(honest, folder, case) == ""


def test_an_archive_has_the_same_bytes_again(folder: Folder, tmp_path: Path) -> None:
    """Whenever the files were written, and in whatever order they lie there."""
    first, second = tmp_path / "first.tar.gz", tmp_path / "second.tar.gz"
    write_archive(folder.path, first)
    (folder.path / MANIFEST).touch()
    write_archive(folder.path, second)
    assert first.read_bytes() == second.read_bytes()
    with tarfile.open(first) as tar:
        members = tar.getmembers()
        assert [m.name for m in members] == sorted(f"few/{path.name}" for path in folder.path.iterdir())
        assert {(m.mtime, m.uid, m.uname, m.mode) for m in members} == {(0, 0, "", 0o644)}
        held = tar.extractfile(f"few/{MANIFEST}")
        assert held is not None
        assert held.read() == (folder.path / MANIFEST).read_bytes()


def test_the_command_writes_a_folder_and_an_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, archive = tmp_path / "deep" / "v", tmp_path / "v.tar.gz"
    assert main(["vectors", str(place), "--only", "empty-slots", "--archive", str(archive)]) == 0
    assert capsys.readouterr().out.startswith(f"{place}: 1 cases of 2 clauses, ")
    assert sorted(path.name for path in place.iterdir()) == ["empty-slots.mrv", "empty-slots.safetensors", MANIFEST]
    assert archive.exists()
    lost = tmp_path / "none" / "v.tar.gz"
    assert main(["vectors", str(tmp_path / "w"), "--only", "empty-slots", "--archive", str(lost)]) == 2
    assert capsys.readouterr().err == f"--archive {lost}: must lie in a folder that exists\n"
    assert not (tmp_path / "w").exists()
    before = (place / MANIFEST).stat().st_mtime_ns
    assert main(["vectors", str(place)]) == 1
    assert capsys.readouterr().err == f"{place}: has files in it: must be empty, or not be there\n"
    assert (place / MANIFEST).stat().st_mtime_ns == before
    assert main(["vectors", str(archive)]) == 1
    assert "is a file" in capsys.readouterr().err
    assert main(["vectors", str(place), "--only", "no-such-case"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """A folder has all of its files, or is not there."""

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_vectors(tmp_path / "v", {"batch": CASES["batch"]}, stop)
    assert [*tmp_path.iterdir()] == []


def test_bytes_come_back(folder: Folder) -> None:
    for name in folder.entries:
        data = (folder.path / f"{name}.mrv").read_bytes()
        assert to_bytes(from_bytes(name, data)) == data
    with pytest.raises(BadVectors):
        from_bytes("x", data + b"\0")
