"""The command that runs the suite and the comparison, and writes one page of HTML on both."""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

import executors
from executors._cli import options as cli
from executors._compare import report as comparison_report
from executors._compare import run as comparison
from executors._compare.judge import exact_answer
from executors._files.whole import write_text
from executors._report.facts import facts
from executors._report.judged import JudgedExecutor, SuiteRun
from executors._report.page import Report, page
from executors._report.suite import NEEDS, PROFILES, SuiteSettings, run_suite
from executors.layer_file import Layer
from moe_ref.conformance.reporting.results import BadResultsError, read_results

INTERPRETED = "its kernels are interpreted here, which takes long; --executor includes it"
Show = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ReportOptions:
    """What can be asked of a report."""

    file: cli.FileArgument = None
    executor: Annotated[
        list[str] | None,
        typer.Option("--executor", metavar="NAME", help="Only this one; repeatable. Default: all usable but auto."),
    ] = None
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page.")] = Path("report.html")
    profile: Annotated[str, typer.Option(metavar="NAME", help="The suite's: quick, dev, ci or nightly.")] = "quick"
    results: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="What pytest --results FILE has written, instead of a run; repeatable."),
    ] = None
    expected_failures: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Failures by clause that are known; as of the suite.")
    ] = None
    device: cli.DeviceOption = "cpu"
    limit: Annotated[
        float, typer.Option(callback=cli.within(1), metavar="SECONDS", help="End an executor's suite after so long.")
    ] = 3600.0
    tokens: cli.TokensOption = None
    repeats: cli.RepeatsOption = 10
    seed: cli.SamplesSeedOption = 0


@cli.with_options(ReportOptions)
def report(options: ReportOptions) -> None:
    """Runs the suite and a comparison, and writes one page on both.

    The page is one HTML file that needs no network: clauses by executor with the failing example under each red cell,
    errors in error bars, times with their noise, machine and versions. Each executor is judged in a process of its own.
    A suite with profile quick takes about a minute on 2 cores, dev and ci take several, nightly takes hours; the
    comparison takes a minute or two besides. Exit status: 0 if nothing fails, 1 if something does, 2 for bad arguments.

    Example: python -m executors report layer.safetensors --executor native --executor my_loop --out trust.html
    """
    _check(options)
    given = _given(options.results)
    names, left_out = _names(options, given)
    layer, without_choice = cli.load_clear(options.file, options.device, options.tokens)
    started = time.monotonic()
    if len(names) > 1 and not given:
        cli.print_lines([f"judging {len(names)} executors, one after the other: {', '.join(names)}"])
    with cli.progress_bar() as show:
        suites = given or _suites(names, options, show)
        rows, lines = _compared(layer, suites, options, show)
    if without_choice:
        lines.append(f"{without_choice} tokens left out: more than one choice of experts is right for them (R2)")
    sources = {row.name: row.source for row in executors.explain()}
    judged = [
        JudgedExecutor(name, suites[name], rows[name], sources.get(name, ""), _again(options, name)) for name in names
    ]
    try:
        write_text(options.out, page(Report(judged, lines, facts(sys.argv[1:], names), left_out)))
    except OSError as error:
        cli.refuse(f"--out {options.out}: cannot be written, {error.strerror}")
    for own in judged:
        cli.print_lines([f"{own.name}: {own.counted}"])
        if own.row.judgement and own.row.failed:
            cli.print_lines([f"{own.name}: on the layer: {comparison_report.failed(own.row.judgement)}"])
    cli.print_lines([f"wrote {options.out} ({time.monotonic() - started:.0f} s)"])
    if any(own.failed for own in judged):
        raise typer.Exit(1)


def _check(options: ReportOptions) -> None:
    """Refuses what would fail only after minutes."""
    if options.out.is_dir() or not options.out.parent.is_dir():
        cli.refuse(f"--out {options.out}: must be a file in a folder that exists")
    cli.checked("--profile", [options.profile], PROFILES)
    lacking = [name for name in NEEDS if find_spec(name) is None]
    if lacking and not options.results:
        cli.refuse(f'report needs {lacking[0]}: pip install "moe-ref[conformance]"')
    if options.results and options.expected_failures:
        cli.refuse(f"--expected-failures {options.expected_failures}: must be left out with --results")
    if options.expected_failures and not options.expected_failures.is_file():
        cli.refuse(f"--expected-failures {options.expected_failures}: must be a file")


def _given(paths: list[Path] | None) -> dict[str, SuiteRun]:
    """Results of files, by executor."""
    found: dict[str, SuiteRun] = {}
    for path in paths or ():
        try:
            results = read_results(path)
        except BadResultsError as error:
            cli.refuse(f"--results {error}")
        for name, own in results.executors.items():
            if name in found:
                cli.refuse(f"--results {path}: {name}: must be in one of the files only")
            found[name] = SuiteRun(own, results.device, results.profile, results.left_out, version=results.version)
    if paths and not found:
        cli.refuse(f"--results {paths[0]}: must have an executor")
    return found


def _names(options: ReportOptions, given: Mapping[str, SuiteRun]) -> tuple[list[str], list[tuple[str, str]]]:
    """Who is judged, and who is left out and why."""
    if given:
        return list(cli.checked("--executor", options.executor, [*given]) or given), []
    cli.chosen_names(options.executor)  # refuses names that nobody has
    sources = {row.name: row.source for row in executors.explain()}
    known = sorted(comparison.everyone(), key=lambda name: (name != "native", sources[name] != "built-in", name))
    reasons = {name: _unusable(name, options.device) for name in known}
    for name in options.executor or ():
        if reasons[name] not in ("", INTERPRETED):
            cli.refuse(f"--executor {name}: {reasons[name]}")
    if options.executor:
        return list(dict.fromkeys(options.executor)), []
    return [name for name in reasons if not reasons[name]], [(n, why) for n, why in reasons.items() if why]


def _unusable(name: str, device: str) -> str:
    """Why an executor is not judged unless it is asked for, or ""."""
    try:
        able = executors.get(name).capabilities
    except (executors.Unavailable, ValueError) as error:
        return " ".join(str(error).split())
    if able.devices and device.partition(":")[0] not in able.devices:
        return f"its devices are {', '.join(sorted(able.devices))}, and --device is {device}"
    return INTERPRETED if able.interpreted else ""


def _suites(names: Sequence[str], options: ReportOptions, show: Show) -> dict[str, SuiteRun]:
    """The suite on each executor, with its place among all and a guess of the time that is left."""
    settings = SuiteSettings(options.profile, options.device, options.expected_failures, options.limit)
    started, found = time.monotonic(), dict[str, SuiteRun]()
    for number, name in enumerate(names):
        left = (time.monotonic() - started) / number * (len(names) - number) if number else 0.0
        guess = f", about {math.ceil(left / 60)} min left for suites" if left else ""
        said = f"suite on {name}, {number + 1} of {len(names)}{guess}"

        def part(done: int, said: str = said) -> None:
            show(said, done, 100)

        part(0)
        found[name] = run_suite(name, settings, part)
    return found


def _again(options: ReportOptions, name: str) -> str:
    """The command that judges an executor on the layer again."""
    given = [str(options.file)] if options.file else []
    given += ["--executor", name]
    for option in ("device", "tokens", "seed"):
        if (value := getattr(options, option)) != getattr(ReportOptions, option):
            given += [f"--{option}", str(value)]
    return shlex.join(["python", "-m", "executors", "compare", *given])


def _compared(
    layer: Layer, suites: Mapping[str, SuiteRun], options: ReportOptions, show: Show
) -> tuple[dict[str, comparison.CompareRow], list[str]]:
    """What came of the layer: a row for each executor, and lines on the layer."""
    reasons = {name: _unmeasured(name, own) for name, own in suites.items()}
    truth = exact_answer(layer, options.seed, lambda done, total: show("sampling error bars", done, total))
    rows = comparison.compare(
        layer,
        truth,
        [name for name, reason in reasons.items() if not reason],
        options.repeats,
        options.seed,
        options.tokens,
        lambda text: show(text, 0, 0),
    )
    measured = {row.name: row for row in rows}
    lines = comparison_report.heading(layer, truth, comparison.display(layer.path)).splitlines()
    return {name: measured.get(name) or comparison.CompareRow(name, reason) for name, reason in reasons.items()}, lines


def _unmeasured(name: str, suite: SuiteRun) -> str:
    """Why an executor is not run in this process, or ""."""
    if suite.crashed:
        return "it ended the process of the suite" if suite.results else "the suite did not finish"
    return "" if name in comparison.everyone() else "its name is of no installed package"
