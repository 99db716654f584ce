"""The same selection in DuckDB and in Polars: `python -m ... PLAN FOLDER ROWS SHARDS`.

Of each shard the kept rows (key, label, copies) are written into a file of their own; in the plans
named `..._every_row` all rows are, each with its reason, from files whose sha256 was checked, into
files that are synced to the disk: what our stage does. Files are compressed by LZ4, as our keys
are: with zstd both libraries take some hundredths longer. Copies are rounded by a hash of the
library's own, so they may differ from ours where their expectation is not whole; keys, labels and
reasons may not.
"""

import hashlib
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.references.selection_data import LABELER, MAX_COPIES, THRESHOLD, Problem
from benchmarks.references.selection_process import cpu_seconds, peak_bytes, set_aside

THREADS = 2
os.environ["POLARS_MAX_THREADS"] = str(THREADS)  # before polars is imported


_DUCKDB: dict[str, Any] = {
    "threads": THREADS,
    "preserve_insertion_order": False,
    "partitioned_write_max_open_files": 10_000,  # more than there are shards: none is begun twice
}
# Where memory is not limited, a partition is written at once, and not in hundreds of row groups.
_IN_MEMORY = {"partitioned_write_flush_threshold": 100_000_000}


def duckdb_window(files: str, out: Path, problem: Problem, memory: str | None = None) -> None:
    """Number the rows of each class, in one statement; it spills where memory ends."""
    import duckdb

    quota = problem.quota
    settings = _DUCKDB | _IN_MEMORY
    if memory is not None:
        settings = _DUCKDB | {"memory_limit": memory, "temp_directory": f"{out}-spill"}
    duckdb.connect(config=settings).execute(f"""
        COPY (
          WITH passed AS (
            SELECT key, label, confidence, file_index AS shard
            FROM read_parquet('{files}')
            WHERE confidence >= {THRESHOLD}::FLOAT
          ), ranked AS (
            SELECT key, label, shard, count(*) OVER (PARTITION BY label) AS n,
                   row_number() OVER (PARTITION BY label ORDER BY confidence DESC, shard, key) AS r
            FROM passed
          ), expected AS (
            SELECT key, label, shard, least({MAX_COPIES}, {quota} / least(n, {quota})) AS e
            FROM ranked WHERE r <= {quota}
          )
          SELECT shard, key, label, (floor(e) + (
            hash(shard, key) % 1000003 / 1000003.0 < e - floor(e))::INT)::USMALLINT AS copies
          FROM expected
        ) TO '{out}' (FORMAT parquet, COMPRESSION lz4_raw, PARTITION_BY (shard))
    """)


def duckdb_two_passes(files: str, out: Path, problem: Problem, memory: str = "512MB") -> None:
    """Count by class and bin first, then rank the rows of each class's last bin alone."""
    import duckdb

    quota = problem.quota
    db = duckdb.connect(config=_DUCKDB | {"memory_limit": memory, "temp_directory": f"{out}-spill"})
    passed = f"""
        SELECT key, label, confidence, file_index AS shard,
               least(floor(confidence * 4096), 4095)::SMALLINT AS bin
        FROM read_parquet('{files}') WHERE confidence >= {THRESHOLD}::FLOAT
    """
    db.execute(f"""
        CREATE TEMP TABLE cuts AS
          WITH bins AS (SELECT label, bin, count(*) AS n FROM ({passed}) GROUP BY ALL),
          above AS (
            SELECT label, bin, sum(n) OVER (PARTITION BY label ORDER BY bin DESC) AS reached,
                   sum(n) OVER (PARTITION BY label) AS total, n FROM bins
          )
          SELECT label, max(total) AS n, max(bin) FILTER (reached >= {quota}) AS cut,
                 {quota} - coalesce(max(reached) FILTER (reached < {quota}), 0) AS wanted
          FROM above GROUP BY label
    """)
    db.execute(f"""
        CREATE TEMP TABLE last AS
          SELECT shard, key FROM (
            SELECT p.shard, p.key, c.wanted, row_number() OVER (
              PARTITION BY p.label ORDER BY p.confidence DESC, p.shard, p.key) AS r
            FROM ({passed}) p JOIN cuts c ON p.label = c.label AND p.bin = c.cut
          ) WHERE r <= wanted
    """)
    db.execute(f"""
        COPY (
          WITH kept AS (
            SELECT p.shard, p.key, p.label,
                   least({MAX_COPIES}, {quota} / least(c.n, {quota})) AS e
            FROM ({passed}) p JOIN cuts c ON p.label = c.label
            WHERE p.bin > coalesce(c.cut, -1)
              OR (p.bin = c.cut AND (p.shard, p.key) IN (SELECT (shard, key) FROM last))
          )
          SELECT shard, key, label, (floor(e) + (
            hash(shard, key) % 1000003 / 1000003.0 < e - floor(e))::INT)::USMALLINT AS copies
          FROM kept
        ) TO '{out}' (FORMAT parquet, COMPRESSION lz4_raw, PARTITION_BY (shard))
    """)


def duckdb_every_row(files: str, out: Path, problem: Problem) -> None:
    """Write every row with its reason, from verified files, and sync what is written."""
    import duckdb

    _verify(files)
    quota = problem.quota
    duckdb.connect(config=_DUCKDB | _IN_MEMORY).execute(f"""
        COPY (
          WITH judged AS (
            SELECT key, label, confidence, file_index AS shard,
                   confidence >= {THRESHOLD}::FLOAT AS passes
            FROM read_parquet('{files}')
          ), ranked AS (
            SELECT key, label, shard, passes,
                   count(*) FILTER (passes) OVER (PARTITION BY label) AS n,
                   row_number() OVER (PARTITION BY label ORDER BY confidence DESC, shard, key) AS r
            FROM judged
          ), expected AS (
            SELECT key, label, shard, passes, passes AND r <= {quota} AS kept,
                   least({MAX_COPIES}, {quota} / least(n, {quota})) AS e
            FROM ranked
          )
          SELECT shard, key,
                 (CASE WHEN kept THEN 0 WHEN passes THEN 2 ELSE 1 END)::TINYINT AS reason,
                 (CASE WHEN kept THEN floor(e) + (
                   hash(shard, key) % 1000003 / 1000003.0 < e - floor(e))::INT ELSE 0 END
                 )::USMALLINT AS copies, label
          FROM expected
        ) TO '{out}' (FORMAT parquet, COMPRESSION lz4_raw, PARTITION_BY (shard))
    """)
    _sync(out)


def polars_window(files: str, out: Path, problem: Problem) -> None:
    """Sort by class and confidence, number within the class, write each shard's rows."""
    import polars as pl

    quota = problem.quota
    numbered = (
        pl.scan_parquet(files, include_file_paths="shard")
        .select("key", "label", "confidence", pl.col("shard").cast(pl.Categorical))
        .filter(pl.col("confidence") >= pl.lit(THRESHOLD, pl.Float32))
        .collect()
        .sort(["label", "confidence", "shard", "key"], descending=[False, True, False, False])
        .with_columns(
            rank=pl.int_range(pl.len()).over("label"),
            expected=(quota / pl.len().over("label").clip(upper_bound=quota)).clip(
                upper_bound=MAX_COPIES
            ),
        )
        .filter(pl.col("rank") < quota)
    )
    rest = pl.col("expected") - pl.col("expected").floor()
    draw = pl.struct("shard", "key").hash() % 1_000_003 / 1_000_003
    kept = numbered.select(
        "shard",
        "key",
        "label",
        copies=(pl.col("expected").floor() + (draw < rest).cast(pl.UInt16)).cast(pl.UInt16),
    )
    _write_parts(kept, out)


def polars_every_row(files: str, out: Path, problem: Problem) -> None:
    """Write every row with its reason, from verified files, and sync what is written."""
    import polars as pl

    _verify(files)
    quota = problem.quota
    numbered = (
        pl.scan_parquet(files, include_file_paths="shard")
        .select("key", "label", "confidence", pl.col("shard").cast(pl.Categorical))
        .collect()
        .sort(["label", "confidence", "shard", "key"], descending=[False, True, False, False])
        .with_columns(passes=pl.col("confidence") >= pl.lit(THRESHOLD, pl.Float32))
        .with_columns(
            kept=pl.col("passes") & (pl.int_range(pl.len()).over("label") < quota),
            expected=(
                quota / pl.col("passes").sum().over("label").clip(lower_bound=1, upper_bound=quota)
            ).clip(upper_bound=MAX_COPIES),
        )
    )
    rest = pl.col("expected") - pl.col("expected").floor()
    draw = pl.struct("shard", "key").hash() % 1_000_003 / 1_000_003
    copies = (pl.col("expected").floor() + (draw < rest).cast(pl.UInt16)).cast(pl.UInt16)
    rows = numbered.select(
        "shard",
        "key",
        reason=pl.when("kept").then(0).when("passes").then(2).otherwise(1).cast(pl.Int8),
        copies=pl.when("kept").then(copies).otherwise(pl.lit(0, pl.UInt16)),
        label="label",
    )
    _write_parts(rows, out)
    _sync(out)


def _write_parts(rows: Any, out: Path) -> None:
    """Write a file of each shard's rows, numbered in the order of the shards' names."""
    out.mkdir(parents=True)
    parts = rows.partition_by("shard", as_dict=True, include_key=False)
    for number, shard in enumerate(sorted(str(shard) for (shard,) in parts)):
        parts[(shard,)].write_parquet(out / f"{number:05d}.parquet", compression="lz4")


def _verify(files: str) -> None:
    """Check every file against the sha256 in its name."""

    def check(path: Path) -> None:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem.split("-")[1], path

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(check, Path(files).parent.glob("*.parquet")))


def _sync(out: Path) -> None:
    """Have every file below a folder on the disk."""

    def sync(path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    with ThreadPoolExecutor(4 * THREADS) as pool:  # as many as our stage has
        list(pool.map(sync, out.rglob("*.parquet")))


def read_only(files: str, out: Path, problem: Problem) -> None:
    """Merely read label and confidence of every row, on two threads."""
    import pyarrow
    import pyarrow.dataset

    pyarrow.set_cpu_count(THREADS)
    paths = sorted(str(path) for path in Path(files).parent.glob("*.parquet"))
    found = pyarrow.dataset.dataset(paths, format="parquet").to_batches(
        columns=["label", "confidence"]
    )
    assert sum(batch.num_rows for batch in found) == problem.num_rows


PLANS: dict[str, Callable[..., None]] = {
    "duckdb_window": duckdb_window,
    "duckdb_window_512mb": partial(duckdb_window, memory="512MB"),
    "duckdb_two_passes": duckdb_two_passes,
    "polars_window": polars_window,
    "duckdb_every_row": duckdb_every_row,
    "polars_every_row": polars_every_row,
    "read_only": read_only,
}


def run(plan: str, folder: Path, problem: Problem) -> dict[str, Any]:
    """Run a plan and tell what it took."""
    library = plan.split("_")[0]
    if library in ("duckdb", "polars"):
        importlib.import_module(library)  # as our side's are, before the clock runs
    files = str(folder / "store" / "predictions" / LABELER / "*.parquet")
    out = folder / f"out-{plan}"
    set_aside(out)
    before, cpu, started = peak_bytes(), cpu_seconds(), time.monotonic()
    PLANS[plan](files, out, problem)
    return {
        "seconds": time.monotonic() - started,
        "cpu_seconds": cpu_seconds() - cpu,
        "peak_bytes": peak_bytes(),
        "bytes_before": before,
    }


if __name__ == "__main__":
    result = run(sys.argv[1], Path(sys.argv[2]), Problem(int(sys.argv[3]), int(sys.argv[4])))
    print(json.dumps(result))
