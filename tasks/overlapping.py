"""Work that goes on in threads beside the main work: items read ahead, items written behind."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import repeat
from typing import TypeVar, cast

T = TypeVar("T")
R = TypeVar("R")

_NOTHING = object()


def read_ahead(items: Iterable[T], read: Callable[[T], R], *, threads: int = 1) -> Generator[R]:
    """Yield `read` of every item in order, and read the next ones while this one is used.

    An error of `read` is raised where its item is due.

    Args:
        items: what to read.
        read: called from threads.
        threads: that read, and so items that are held besides the one in use; 0: each item is read
            by the caller's thread when it is due.
    """
    if threads == 0:
        yield from map(read, items)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="read-ahead") as pool:
        following: deque[Future[R]] = deque()
        for item in items:
            following.append(pool.submit(read, item))
            if len(following) > threads:
                yield following.popleft().result()
        while following:
            yield following.popleft().result()


def taken_ahead(items: Iterator[T]) -> Generator[T]:
    """Yield items in order, and take the next one from a thread while this one is used."""
    taken = read_ahead(repeat(None), lambda _: next(items, _NOTHING))
    for item in taken:
        if item is _NOTHING:
            return
        yield cast("T", item)


def write_behind(items: Iterable[T], write: Callable[[T], R], *, threads: int = 1) -> Generator[R]:
    """Yield `write` of every item in order, and write some while the next is made.

    An item is yielded when it is written. Whatever was taken from `items` is written in any case,
    be it that making the next one fails or that nobody wants any more. An error of `write` is
    raised when as many more items as there are threads have been taken, or before.

    Args:
        items: what to write.
        write: called from threads.
        threads: that write, and so items that are held besides the one that is made; 0: each item
            is written by the caller's thread before the next is made.
    """
    if threads == 0:
        yield from map(write, items)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="write-behind") as pool:
        pending: deque[Future[R]] = deque()
        try:
            for item in items:
                while len(pending) >= threads:
                    yield pending.popleft().result()
                pending.append(pool.submit(write, item))
        finally:
            # Also where making an item failed: the write that goes on must not fail unseen.
            unseen = [future.exception() for future in pending]
            for error in unseen:
                if error is not None:
                    raise error
        while pending:
            yield pending.popleft().result()
