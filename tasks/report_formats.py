"""How numbers, states and configs are written in the report; an unknown value is `n/a`."""

import json
import re
from collections.abc import Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

UNKNOWN = "n/a"

_NARROW = "\N{NARROW NO-BREAK SPACE}"
_PLAIN_SCALAR = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")
# Bare words that YAML 1.1 reads as something else than text.
_YAML_WORDS = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}


def percent(share: float | None) -> str:
    """Return a share in [0, 1] as percent with one decimal."""
    return UNKNOWN if share is None else f"{100 * share:.1f}{_NARROW}%"


def interval(bounds: Sequence[float] | None) -> str:
    """Return the bounds of a share in percent, `[93.3, 97.3]`; nothing where there are none."""
    return "" if bounds is None else f"[{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]"


def points(difference: float | None) -> str:
    """Return a difference of two shares in percentage points, always with its sign."""
    if difference is None:
        return UNKNOWN
    # Half up: 95.75 % (written 95.8) - 93.5 % should read +2.3, not +2.2. The six decimals take
    # away what binary fractions add.
    exact = Decimal(f"{100 * difference:.6f}")
    text = f"{exact.quantize(Decimal('0.1'), ROUND_HALF_UP):+}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "\N{MINUS SIGN}")


def points_interval(low: float, high: float) -> str:
    """Return the bounds of a difference in percentage points."""
    return f"[{points(low)}, {points(high)}]"


def count(number: float | None) -> str:
    """Return a whole number with separators."""
    return UNKNOWN if number is None else f"{number:,.0f}"


def brief(number: float) -> str:
    """Return a number in four digits, from 1,000 on whole with separators."""
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.4g}"


def decimal(number: float | None) -> str:
    """Return a number with three decimals."""
    return UNKNOWN if number is None else f"{number:.3f}"


def duration(seconds: float | None) -> str:
    """Return a time as people say it: `0.3 s`, `29 s`, `4 min 12 s`, `3 h 05 min`."""
    if seconds is None:
        return UNKNOWN
    if seconds < 9.95:
        return f"{seconds:.1f}{_NARROW}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}{_NARROW}s"
    if whole < 3600:
        return f"{whole // 60}{_NARROW}min {whole % 60:02d}{_NARROW}s"
    return f"{whole // 3600}{_NARROW}h {whole % 3600 // 60:02d}{_NARROW}min"


def size(num_bytes: int | None) -> str:
    """Return a number of bytes with a decimal unit."""
    if num_bytes is None:
        return UNKNOWN
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.0f}{_NARROW}{unit}" if unit == "B" else f"{value:.1f}{_NARROW}{unit}"
        value /= 1000
    return f"{value:.1f}{_NARROW}TB"


def utc(time: str | None) -> str:
    """Return an ISO 8601 time in UTC as `2026-11-21 09:41 UTC`."""
    return UNKNOWN if time is None else f"{time[:10]} {time[11:16]} UTC"


def words(name: str) -> str:
    """Return an identifier as words: `below_threshold` is `below threshold`."""
    return name.replace("_", " ")


def yaml_text(value: Any, *, depth: int = 0) -> str:
    """Return JSON data as block YAML, mappings in their own order.

    tasks/ may not import a YAML library: the config is written here for people to read and copy,
    and read nowhere in this package.
    """
    indent = "  " * depth
    if isinstance(value, Mapping) and value:
        return "".join(
            f"{indent}{_scalar(key)}:{_below(item, depth)}" for key, item in value.items()
        )
    if isinstance(value, list) and value:
        return "".join(f"{indent}-{_below(item, depth)}" for item in value)
    return f"{indent}{_scalar(value)}\n"


def _below(item: Any, depth: int) -> str:
    if isinstance(item, list) and not any(isinstance(one, (dict, list)) for one in item):
        return f" [{', '.join(_scalar(one) for one in item)}]\n"
    if isinstance(item, (Mapping, list)) and item:
        return "\n" + yaml_text(item, depth=depth + 1)
    return f" {_scalar(item)}\n"


def _scalar(value: Any) -> str:
    if isinstance(value, str) and _PLAIN_SCALAR.fullmatch(value):
        return value if value.lower() not in _YAML_WORDS else json.dumps(value)
    text = json.dumps(value, ensure_ascii=False)
    if isinstance(value, float) and "e" in text and "." not in text:
        return text.replace("e", ".0e")  # YAML 1.1 takes 1e-05 for text
    return text
