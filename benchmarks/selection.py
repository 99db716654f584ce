"""Selecting at corpus scale: the stage against DuckDB, Polars and merely reading.

Per-class top-k with a threshold and duplication over 1,000 long-tailed classes. Our side is the
real stage: it reads predictions as labelling stores them, verifies them by sha256, and writes every
row with its reason into a local store, synced to the disk, with a record per group of shards. The
libraries read the same files, verify nothing, and write the kept rows alone, unsynced; beside it
stand plans of theirs that verify, write every row and sync, too. Each runs in a process of its own;
memory is what it takes beyond the interpreter with all that is imported.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.figures import Figure, benchmark_parser, figure, print_figures
from benchmarks.references.selection_data import Problem, labeling_of, make_labeling
from storage.corpus import load_corpus
from tasks.specifications import read_result

LIBRARY_PLANS = ("duckdb_window", "duckdb_window_512mb", "duckdb_two_passes", "polars_window")
EVERY_ROW_PLANS = ("duckdb_every_row", "polars_every_row")
"""Of the libraries, doing all that our stage does save its records."""

_SHARDS = 1_000
_GIGABYTE = 1e9


def main() -> None:
    parser = benchmark_parser(__doc__, quick="10**6 rows in 100 files, once")
    parser.add_argument("--rows", type=float, default=1e7, help="how many, in 1,000 files")
    parser.add_argument("--repeats", type=int, default=3, help="of which the quickest counts")
    parser.add_argument("--folder", type=Path, help="where predictions are kept for another time")
    options = parser.parse_args()
    problem = Problem(int(options.rows), _SHARDS)
    if options.quick:
        problem = Problem(10**6, 100)
    root = options.folder or Path(tempfile.mkdtemp(prefix="selftrain-selection-"))
    try:
        figures = _figures(root, problem, 1 if options.quick else options.repeats, options.quick)
    finally:
        if options.folder is None:
            shutil.rmtree(root)
    print_figures(figures, as_json=options.json)


def _figures(root: Path, problem: Problem, repeats: int, quick: bool) -> list[Figure]:
    folder = _made(root, problem)
    found: dict[str, list[dict[str, Any]]] = {}
    for _ in range(repeats):  # in turns, so that a busy minute hits all of them
        for plan in ("ours", "read_only", *LIBRARY_PLANS, *EVERY_ROW_PLANS):
            found.setdefault(plan, []).append(_run(plan, folder, problem))
            print(plan, found[plan][-1], file=sys.stderr)
    for plan in (*LIBRARY_PLANS, *EVERY_ROW_PLANS):
        _check_equal(folder, found["ours"][-1]["fingerprint"], plan)
    best = {plan: min(runs, key=lambda run: run["seconds"]) for plan, runs in found.items()}
    library = min(LIBRARY_PLANS, key=lambda plan: best[plan]["seconds"])
    same = min(EVERY_ROW_PLANS, key=lambda plan: best[plan]["seconds"])
    smaller = Problem(problem.num_rows // 10, problem.num_shards // 10)
    small = _run("ours", _made(root, smaller), smaller)
    ours, per_row = best["ours"], f"{problem.num_rows:.0e} rows"
    others = (*LIBRARY_PLANS, *EVERY_ROW_PLANS)
    peaks = ", ".join(f"{plan} {_peak(best[plan]):.2f}" for plan in others)
    seconds = ", ".join(f"{plan} {best[plan]['seconds']:.1f}" for plan in best)
    cores = f"{ours['cpu_seconds']:.1f} s of cores, {library} {best[library]['cpu_seconds']:.1f} s"
    return [
        figure(
            "selection_over_best_library",
            ours["seconds"] / best[library]["seconds"],
            "x",
            goal=1.0,
            direction="at_most",
            against=f"{library}; {per_row}; seconds: {seconds}; {cores}",
            quick=quick,
            seeds=[0],
        ),
        figure(
            "selection_over_library_of_every_row",
            ours["seconds"] / best[same]["seconds"],
            "x",
            goal=1.0,
            direction="at_most",
            against=f"{same}: inputs verified, every row written with its reason, outputs synced;"
            f" {per_row}; it took {_peak(best[same]):.2f} GB",
            quick=quick,
            seeds=[0],
        ),
        figure(
            "selection_over_read",
            ours["seconds"] / best["read_only"]["seconds"],
            "x",
            goal=10.0,
            direction="at_most",
            against=f"pyarrow reading label and confidence on two threads; {per_row}",
            quick=quick,
            seeds=[0],
        ),
        figure(
            "selection_peak_gb",
            _peak(ours),
            "GB",
            goal=0.5,
            direction="at_most",
            against=f"{per_row}; of a tenth of them {_peak(small):.2f}; libraries: {peaks}; besides"
            f" {ours['bytes_before'] / _GIGABYTE:.2f} of imports",
            quick=quick,
            seeds=[0],
        ),
    ]


def _peak(run: dict[str, Any]) -> float:
    return (run["peak_bytes"] - run["bytes_before"]) / _GIGABYTE


def _made(root: Path, problem: Problem) -> Path:
    folder = root / f"{problem.num_rows}-{problem.num_shards}"
    folder.mkdir(parents=True, exist_ok=True)
    make_labeling(folder, problem)
    return folder


def _run(plan: str, folder: Path, problem: Problem) -> dict[str, Any]:
    arguments = [str(folder), str(problem.num_rows), str(problem.num_shards)]
    module = "benchmarks.references.selection_ours"
    if plan != "ours":
        module, arguments = "benchmarks.references.selection_libraries", [plan, *arguments]
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _check_equal(folder: Path, fingerprint: str, plan: str) -> None:
    """Compare every shard's rows with ours: those that are kept, or all with their reasons.

    Raises: AssertionError for another key, label or reason, or copies that differ by more than
        rounding.
    """
    names = ["key", "label", "copies"] + (["reason"] if plan in EVERY_ROW_PLANS else [])
    store, _ = labeling_of(folder)
    manifest = read_result(store, "select", fingerprint)
    assert manifest is not None, "our own run has committed it"
    shards = load_corpus(store, (folder / "done").read_text()).shards
    files = sorted((folder / f"out-{plan}").rglob("*.parquet"), key=_shard_number)
    assert len(files) == len(shards), f"{plan} wrote {len(files)} files"
    differences = 0
    for shard, path in zip(shards, files, strict=True):
        ours = pq.read_table(
            f"{store.url}/{manifest.object(shard.digest).path}", columns=names
        ).sort_by("key")
        if plan not in EVERY_ROW_PLANS:
            ours = ours.filter(ours.column("copies").to_numpy() > 0)
        theirs = pq.ParquetFile(path).read(columns=names).sort_by("key")
        for name in set(names) - {"copies"}:
            assert ours.column(name).to_pylist() == theirs.column(name).to_pylist(), (plan, shard)
        copies = [t.column("copies").to_numpy().astype(np.int64) for t in (ours, theirs)]
        differences = max(differences, int(np.abs(copies[0] - copies[1]).max(initial=0)))
    assert differences <= 1, f"{plan}: copies differ by {differences}"


def _shard_number(path: Path) -> int:
    """DuckDB names a folder `shard=7`, Polars' loop a file `00007.parquet`."""
    named = path.parent.name if path.parent.name.startswith("shard=") else path.stem
    return int(named.removeprefix("shard="))


if __name__ == "__main__":
    main()
