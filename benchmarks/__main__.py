"""Run benchmarks in full and rewrite docs/benchmarks.md: `make bench`, or by name.

    python -m benchmarks                  # all of them: hours
    python -m benchmarks training         # one; the others' figures stay as they were measured

The figures of every script are kept in benchmarks/results/; the page is made of these.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
PAGE = FOLDER.parent / "docs" / "benchmarks.md"
_NOT_BENCHMARKS = {"__init__", "__main__", "figures", "postgres"}


def main() -> int:
    """Run, write the page, return 1 if a goal was missed in what was run."""
    known = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in _NOT_BENCHMARKS)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(known)}; default: all")
    names: list[str] = parser.parse_args().names or known
    if unknown := sorted(set(names) - set(known)):
        parser.error(f"unknown benchmarks {unknown}; there are {known}")
    figures: list[dict[str, Any]] = []
    for name in names:
        print(f"--- {name}", file=sys.stderr)
        done = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{name}", "--json"],
            stdout=subprocess.PIPE,
            check=True,
        )
        measured: list[dict[str, Any]] = json.loads(done.stdout)
        if measured:  # none where a benchmark's data are missing
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / f"{name}.json").write_text(json.dumps(measured, indent=1) + "\n")
        figures += measured
    PAGE.write_text(render_page(RESULTS), encoding="utf-8")
    print(PAGE, file=sys.stderr)
    return int(any(not _is_met(one) for one in figures))


def render_page(results: Path) -> str:
    """Return docs/benchmarks.md, made of a folder's NAME.json, each what a benchmark printed."""
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench`. Each table comes from `python -m benchmarks.<script>`, run alone"
        " on the machine that stands below it; `python -m benchmarks <script>` measures one anew.",
        "A goal that is not met stays in the table.",
    ]
    for path in sorted(results.glob("*.json")):
        figures: list[dict[str, Any]] = json.loads(path.read_text())
        lines += ["", f"## {path.stem}", "", "| figure | value | goal | met | against | seeds |"]
        lines += ["|---|---|---|---|---|---|"]
        for one in figures:
            sign = "≥" if one["direction"] == "at_least" else "≤"
            seeds = ", ".join(map(str, one["seeds"]))
            lines.append(
                f"| {one['name']} | {one['value']:.3g} {one['unit']} | {sign} {one['goal']:.3g} |"
                f" {'yes' if _is_met(one) else 'no'} | {one['against']} | {seeds} |"
            )
        first = figures[0]
        versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
        lines += ["", f"`benchmarks/{path.stem}.py`; {first['hardware']}; {versions}; "]
        lines[-1] += f"{first['date']}."
    return "\n".join([*lines, ""])


def _is_met(one: dict[str, Any]) -> bool:
    if one["direction"] == "at_least":
        return one["value"] >= one["goal"]
    return one["value"] <= one["goal"]


if __name__ == "__main__":
    sys.exit(main())
