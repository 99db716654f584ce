"""Run every benchmark in full and rewrite the tables in docs/benchmarks.md: `make bench`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
PAGE = FOLDER.parent / "docs" / "benchmarks.md"
_NOT_BENCHMARKS = {"__init__", "__main__", "figures"}


def main() -> int:
    """Run all, write the page, return 1 if a goal was missed."""
    figures: list[dict[str, Any]] = []
    for path in sorted(FOLDER.glob("*.py")):
        if path.stem in _NOT_BENCHMARKS:
            continue
        print(f"--- {path.stem}", file=sys.stderr)
        done = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{path.stem}", "--json"],
            stdout=subprocess.PIPE,
            check=True,
        )
        figures += [{**one, "script": path.stem} for one in json.loads(done.stdout)]
    PAGE.write_text(_page(figures), encoding="utf-8")
    print(PAGE, file=sys.stderr)
    return int(any(not _is_met(one) for one in figures))


def _page(figures: list[dict[str, Any]]) -> str:
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench`; each row comes from `python -m benchmarks.<script>`.",
        "",
        "| figure | value | goal | met | against | seeds | script |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in figures:
        sign = "≥" if one["direction"] == "at_least" else "≤"
        seeds = ", ".join(map(str, one["seeds"]))
        lines.append(
            f"| {one['name']} | {one['value']:.3g} {one['unit']} | {sign} {one['goal']:.3g} |"
            f" {'yes' if _is_met(one) else 'no'} | {one['against']} | {seeds} |"
            f" `benchmarks/{one['script']}.py` |"
        )
    first = figures[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    lines += ["", f"{first['hardware']}; {versions}; {first['date']}.", ""]
    return "\n".join(lines)


def _is_met(one: dict[str, Any]) -> bool:
    if one["direction"] == "at_least":
        return one["value"] >= one["goal"]
    return one["value"] <= one["goal"]


if __name__ == "__main__":
    sys.exit(main())
