"""The one form of a measured figure, and how it is printed."""

import argparse
import json
import os
import platform
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Figure:
    """One measured number, with what it is held against."""

    name: str
    value: float
    unit: str
    goal: float
    direction: Literal["at_least", "at_most"]
    against: str
    quick: bool
    hardware: str
    versions: dict[str, str]
    seeds: list[int]
    date: str

    @property
    def is_met(self) -> bool:
        """Whether the goal is reached."""
        return self.value >= self.goal if self.direction == "at_least" else self.value <= self.goal


def figure(
    name: str,
    value: float,
    unit: str,
    *,
    goal: float,
    direction: Literal["at_least", "at_most"],
    against: str,
    quick: bool,
    seeds: list[int],
) -> Figure:
    """Make a figure measured here and now."""
    return Figure(
        name=name,
        value=value,
        unit=unit,
        goal=goal,
        direction=direction,
        against=against,
        quick=quick,
        hardware=_hardware(),
        versions={"python": platform.python_version()}
        | {package: version(package) for package in ("selftrain", "torch", "prefect")},
        seeds=seeds,
        date=datetime.now(UTC).date().isoformat(),
    )


def benchmark_parser(description: str | None, *, quick: str) -> argparse.ArgumentParser:
    """Return a parser with what every benchmark takes: `--json` and `--quick`.

    Args:
        description: of the benchmark.
        quick: what is less there.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print figures as JSON on stdout")
    parser.add_argument("--quick", action="store_true", help=quick)
    return parser


def print_figures(figures: list[Figure], *, as_json: bool) -> None:
    """Print figures as JSON, the only thing on stdout, or as lines."""
    if as_json:
        print(json.dumps([asdict(one) for one in figures], indent=1))
        return
    for one in figures:
        sign = ">=" if one.direction == "at_least" else "<="
        verdict = "met" if one.is_met else "MISSED"
        print(f"{one.name}: {one.value:.4g} {one.unit} (goal {sign} {one.goal:g}: {verdict})")
        print(f"    against {one.against}; {one.hardware}; seeds {one.seeds}", file=sys.stderr)


def _hardware() -> str:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if "model name" in line), model)
    return f"{os.cpu_count()} x {model}"
