"""Work that goes on in a thread beside the main work: one item read ahead, one written behind."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def read_ahead(items: Iterable[T], read: Callable[[T], R]) -> Generator[R]:
    """Yield `read` of every item in order, and read the next one while this one is used.

    An error of `read` is raised where its item is due.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as thread:
        following: Future[R] | None = None
        for item in items:
            current, following = following, thread.submit(read, item)
            if current is not None:
                yield current.result()
        if following is not None:
            yield following.result()


def write_behind(items: Iterable[T], write: Callable[[T], R]) -> Generator[R]:
    """Yield `write` of every item in order, and write one while the next is made.

    An item is yielded when it is written. Whatever was taken from `items` is written in any case,
    be it that making the next one fails or that nobody wants any more. An error of `write` is
    raised before another item is taken.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="write-behind") as thread:
        pending: deque[Future[R]] = deque()
        try:
            for item in items:
                while pending:
                    yield pending.popleft().result()
                pending.append(thread.submit(write, item))
        finally:
            # Also where making an item failed: the write that goes on must not fail unseen.
            unseen = [future.exception() for future in pending]
            for error in unseen:
                if error is not None:
                    raise error
        while pending:
            yield pending.popleft().result()
