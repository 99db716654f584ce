"""What `selftrain doctor` finds: one line a check, each with what to do."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

DOCTOR_SCHEMA = 1

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One line.

    Attributes:
        name: what was looked at.
        level: fail: a run would fail; warn: it may, or be slow or open to others.
        found: what is there.
        remedy: what to do; empty where it is ok.
    """

    name: str
    level: Level
    found: str
    remedy: str = ""

    def __post_init__(self) -> None:
        assert (self.level == "ok") == (not self.remedy), "what is not ok needs a remedy"


def checked(name: str, check: Callable[[], Iterator[Check]], *, remedy: str) -> list[Check]:
    """Return what a check finds; an exception is one that failed, and ends no other check."""
    found: list[Check] = []
    try:
        found.extend(check())
    except Exception as error:
        message = str(error).split("\n")[0] or type(error).__name__
        found.append(Check(name, "fail", message, remedy))
    return found


def checks_to_json(checks: list[Check]) -> dict[str, Any]:
    """Return the documented form, schema 1."""
    return {
        "schema": DOCTOR_SCHEMA,
        "ok": all(check.level != "fail" for check in checks),
        "checks": [asdict(check) for check in checks],
    }
