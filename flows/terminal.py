"""What the command line shows: live progress on stderr, tables on stdout."""

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from flows.first_choices import time_in_words
from flows.initializing import Initialized
from flows.plan_totals import totals_of
from flows.planning import PlannedStage
from flows.run_status import RunStatus, percent, table_rows
from tasks.progress import Progress, listening
from tasks.report_formats import brief, duration

# Where the output is no terminal, rich would fold tables to 80 columns.
_FILE_WIDTH = 130

out = Console(width=None if sys.stdout.isatty() else _FILE_WIDTH)
err = Console(stderr=True)

_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def showing_progress() -> Iterator[None]:
    """Show every stage of this process as a bar, or as plain lines where stderr is no terminal."""
    if not err.is_terminal:
        with listening(_PlainLines().listen):
            yield
        return
    bars = Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeElapsedColumn(),
        console=err,
    )
    with bars, listening(_LiveBars(bars).listen):
        yield


class _LiveBars:
    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}
        self._lock = threading.Lock()

    def listen(self, progress: Progress) -> None:
        with self._lock:
            if progress.stage not in self._tasks:
                self._tasks[progress.stage] = self._bars.add_task(progress.stage, facts="")
            facts = f"{progress.unit}  {_facts(progress)}"
            self._bars.update(
                self._tasks[progress.stage],
                completed=progress.done,
                total=progress.total,
                facts=facts,
            )


class _PlainLines:
    def __init__(self) -> None:
        self._printed: dict[str, float] = {}

    def listen(self, progress: Progress) -> None:
        now = time.monotonic()
        last = self._printed.get(progress.stage)
        is_finished = progress.done >= progress.total
        if not is_finished and last is not None and now - last < _SECONDS_BETWEEN_LINES:
            return
        self._printed[progress.stage] = now
        line = f"{progress.stage}: {progress.done}/{progress.total} {progress.unit}"
        # A log has no width to fold lines to.
        err.print(
            f"{line}  {_facts(progress)}".rstrip(), highlight=False, markup=False, soft_wrap=True
        )


def print_status(status: RunStatus) -> None:
    """Print the rounds of a run, where report and model lie, and how it ended."""
    table = titled_table(f"run {status.run}: {status.in_words()}")
    columns = ["round", "architecture", "dev accuracy", "test accuracy", "pseudo-labels"]
    for name in [*columns, "precision", "promoted", "seconds"]:
        table.add_column(name, justify="left" if name == "architecture" else "right")
    for row in table_rows(status):
        table.add_row(*row)
    out.print(table)
    out.print(f"{status.labels_in_words()}; accuracies with 95 % intervals", highlight=False)
    for one in status.approvals:
        line = f"round {one.round_index}, {one.question}: {one.in_words()}"
        out.print(line, soft_wrap=True, highlight=False, markup=False)
    if status.waiting_for is not None:
        out.print(status.question_in_words(), soft_wrap=True, highlight=False, markup=False)
    if status.versions_mixed:
        out.print("[yellow]stages of this run were computed under different library versions")
    if status.tracker_failures:
        out.print(
            f"[yellow]metrics did not reach a tracker {status.tracker_failures} times: see the"
            f" report; `selftrain resume {status.run}` writes what one lacks"
        )
    # Not wrapped: paths are there to be copied.
    out.print(f"report: {status.report_url}", soft_wrap=True, highlight=False, markup=False)
    model = status.model_url or "none yet"
    out.print(f"model:  {model}", soft_wrap=True, highlight=False, markup=False)


def print_first_look(made: Initialized) -> None:
    """Print what `init` saw, what it warns of, and how to go on."""
    look = made.look
    table = titled_table(f"{made.path}: run {made.name} in {made.store.url}")
    for name in ["split", "images", "shards", "bytes", "pattern"]:
        table.add_column(name, justify="left" if name in ("split", "pattern") else "right")
    for split, corpus in look.corpora.items():
        counts = f"{corpus.num_samples:,}", f"{len(corpus.shards):,}", _bytes(corpus.num_bytes)
        table.add_row(split, *counts, look.patterns[split])
    out.print(table)
    labels, sizes = look.label_counts.values(), look.sizes
    for line in (
        f"{len(labels)} classes, {min(labels):,} to {max(labels):,} labels each; shorter sides of"
        f" {sizes.looked_at} images: {sizes.smallest} to {sizes.largest}, median {sizes.median}",
        f"network: {made.config.choices['teacher.architecture'][0]} at"
        f" {made.config.choices['teacher.image_size'][0]} pixels; {made.rates.training:,.0f}"
        f" images/s here; all {len(made.stages)} stages about"
        f" {time_in_words(made.config.estimated_seconds['all'])} of arithmetic",
    ):
        out.print(line, highlight=False, markup=False)
    for warning in look.warnings:
        err.print(f"warning: {warning}", style="yellow", highlight=False, markup=False)
    out.print(
        f"Read {made.path}, then: selftrain plan {made.path}; selftrain run {made.path}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )


def print_plan(stages: list[PlannedStage], num_rounds: int) -> None:
    """Print the stages of a plan of at most `num_rounds` rounds and their sum."""
    is_assumed = any(stage.assumed for stage in stages)
    title = "plan, assuming that students still to be judged are promoted" if is_assumed else "plan"
    table = titled_table(title)
    for name in ["round", "stage", "state", "images", "shards", "seconds", "to store", "address"]:
        table.add_column(name, justify="left" if name in ("stage", "address") else "right")
    styles = {"reused": "green", "partial": "yellow", "to_do": ""}
    for stage in stages:
        shards = "" if stage.shards is None else f"{stage.shards_done}/{stage.shards}"
        seconds = "" if stage.estimated_seconds is None else f"{stage.estimated_seconds:.1f}"
        state = stage.state.replace("_", " ") + (" ?" if stage.assumed else "")
        kind = stage.kind if stage.part is None else f"{stage.kind} {stage.part.replace('_', ' ')}"
        cells = [str(stage.round_index), kind, state, f"{stage.samples:,}", shards, seconds]
        cells += [_bytes(stage.estimated_bytes) if stage.estimated_bytes else ""]
        table.add_row(*cells, stage.fingerprint[:12], style=styles[stage.state])
    out.print(table)
    for round_index in sorted({stage.round_index for stage in stages}):
        of_round = [stage for stage in stages if stage.round_index == round_index]
        read, cached = (
            sum(getattr(stage, name) for stage in of_round)
            for name in ("read_bytes", "read_bytes_cached")
        )
        if read:
            out.print(
                f"round {round_index} reads {_bytes(read)} of shards,"
                f" {_bytes(cached)} with a cache",
                highlight=False,
            )
    totals = totals_of(stages)
    out.print(
        f"{totals.stages - totals.to_compute} of {totals.stages} stages are in the store"
        + ("; ? depends on a promotion or an answer to come" if is_assumed else ""),
        highlight=False,
    )
    last_round = max(stage.round_index for stage in stages)
    if last_round < num_rounds:
        out.print(
            f"no round after round {last_round} of {num_rounds}: its student was not promoted, a"
            " person said no, or patience ran out",
            highlight=False,
        )
    if totals.to_compute:
        measured = totals.to_compute - totals.unmeasured
        seconds, devices = totals.estimated_seconds, totals.estimated_device_seconds
        time = (
            f"{devices / 3600:.2f} device-hours ({duration(seconds)} one after the other) by the"
            f" rates of finished stages, for {measured} of them"
            if measured
            else "no stage like them has finished yet to tell their time"
        )
        out.print(
            f"{totals.to_compute} to compute: {time}; up to {_bytes(totals.estimated_bytes)} to"
            " store",
            highlight=False,
        )


def print_warnings(warnings: Sequence[str]) -> None:
    """Print what should be known before a run is started."""
    for warning in warnings:
        err.print(f"warning: {warning}", style="yellow", highlight=False, markup=False)


def print_runs(store: str, runs: list[RunStatus]) -> None:
    """Print a line for each run of a store."""
    if not runs:
        out.print(f"no runs in {store}", soft_wrap=True, highlight=False, markup=False)
        return
    table = titled_table(f"runs in {store}")
    for name in ["run", "state", "rounds", "dev accuracy", "test accuracy"]:
        table.add_column(name)
    for run in runs:
        promoted = [one for one in run.rounds if one.promoted or one.round_index == 0]
        last = promoted[-1] if promoted else None
        dev = percent(last.dev_accuracy, last.dev_interval) if last else ""
        test = percent(last.test_accuracy, last.test_interval) if last else ""
        num_rounds = max((one.round_index for one in run.rounds), default=0)
        table.add_row(run.run, run.state.replace("_", " "), str(num_rounds), dev, test)
    out.print(table)


def print_predictions(predictions: list[dict[str, Any]]) -> None:
    """Print a line for each image."""
    table = titled_table(None)
    for name in ["image", "class", "confidence"]:
        table.add_column(name, overflow="fold")
    for one in predictions:
        label = one.get("label", f"not readable: {one.get('error')}")
        confidence = f"{100 * one['confidence']:.1f} %" if "confidence" in one else ""
        table.add_row(one["path"], label, confidence)
    out.print(table)


def titled_table(title: str | None) -> Table:
    """Return an empty table in the style of all commands."""
    return Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)


def _bytes(number: int) -> str:
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} B"


def _facts(progress: Progress) -> str:
    return "  ".join(f"{name} {brief(value)}" for name, value in progress.facts.items())
