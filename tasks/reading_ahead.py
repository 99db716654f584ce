"""The next parts of a training's steps are made while the current one is used."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Position(NamedTuple):
    """One of the equal parts of a step."""

    step: int
    part: int
    num_parts: int


class ReadAhead(Generic[T]):
    """Gives what `make` gives, made by one thread before it is asked for.

    Which parts this process reads is learned from the order in which it asks; a wrong guess costs
    the making of one part and changes no result.

    Args:
        make: a pure function of the position; called from one thread only.
        depth: parts made ahead.
        initializer: called by the thread before anything else.
    """

    def __init__(
        self, make: Callable[[Position], T], depth: int, *, initializer: Callable[[], None]
    ) -> None:
        self._make = make
        self._depth = depth
        self._thread = ThreadPoolExecutor(1, "batches", initializer=initializer)
        self._pending: dict[Position, Future[T]] = {}
        self._last: Position | None = None
        self._following: dict[int, tuple[int, int]] = {}
        """part -> (steps later, part) that was asked for after it."""

    def get(self, position: Position) -> T:
        """Return what belongs to a position, and begin with those that will follow it."""
        self._learn(position)
        wanted = [position]
        for _ in range(self._depth):
            wanted.append(self._guess(wanted[-1]))
        for stale in self._pending.keys() - set(wanted):
            self._pending.pop(stale).cancel()
        for one in wanted:
            if one not in self._pending:
                self._pending[one] = self._thread.submit(self._make, one)
        return self._pending.pop(position).result()

    def close(self) -> None:
        """Stop making."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _learn(self, position: Position) -> None:
        last, self._last = self._last, position
        if last is not None and last.num_parts == position.num_parts:
            steps = position.step - last.step
            if steps in (0, 1):
                self._following[last.part] = (steps, position.part)

    def _guess(self, position: Position) -> Position:
        is_last = position.part + 1 == position.num_parts
        usual = (1, 0) if is_last else (0, position.part + 1)
        steps, part = self._following.get(position.part, usual)
        return Position(position.step + steps, part, position.num_parts)
