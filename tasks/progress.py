"""Progress of running stages, for whoever shows it (terminal, Prefect artifact); never stored."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """How far a stage has come.

    Attributes:
        stage: what runs, e.g. "round 1 · student".
        done: units finished.
        total: units in all.
        unit: what is counted, e.g. "steps" or "images".
        facts: short named numbers to show beside it, e.g. {"loss": 0.31}.
    """

    stage: str
    done: int
    total: int
    unit: str
    facts: dict[str, float] = field(default_factory=dict)


Listener = Callable[[Progress], None]

_listeners: list[Listener] = []


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Call the listener, from any thread of this process, for every report inside the block."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def report(progress: Progress) -> None:
    """Tell every listener."""
    for listener in tuple(_listeners):
        listener(progress)
