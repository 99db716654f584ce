"""The single values of a config under their dotted keys."""

from collections.abc import Iterator, Mapping
from typing import Any

from storage.file_systems import holds_credentials


def leaves_of(value: Any, *, where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of nested mappings with its dotted key; a list is one value.

    An empty mapping has no values.
    """
    if not isinstance(value, Mapping):
        yield where, value
        return
    for key, below in value.items():
        yield from leaves_of(below, where=f"{where}.{key}" if where else str(key))


def keys_with_credentials(config: Mapping[str, Any]) -> list[str]:
    """Return the dotted keys whose values, or items of lists, are URLs that hold credentials."""
    return [key for key, value in leaves_of(config) if _has_credentials(value)]


def _has_credentials(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_has_credentials(one) for one in value.values())
    if isinstance(value, list | tuple):
        return any(_has_credentials(one) for one in value)
    return isinstance(value, str) and holds_credentials(value)
