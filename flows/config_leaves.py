"""The single values of a config under their dotted keys."""

from collections.abc import Iterator, Mapping
from typing import Any


def leaves_of(value: Any, *, where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of nested mappings with its dotted key; a list is one value.

    An empty mapping has no values.
    """
    if not isinstance(value, Mapping):
        yield where, value
        return
    for key, below in value.items():
        yield from leaves_of(below, where=f"{where}.{key}" if where else str(key))
