"""What can be deleted from a store as a whole, and what each such unit refers to.

A unit is the folder of one fingerprint, or a corpus with its locations. References are followed by
name: a fingerprint is 64 hexadecimal digits that nothing else in the store has, so whatever record
holds it refers to that unit. See docs/decisions/0011-garbage-collection.md.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from storage import local_files, objects
from storage.addresses import canonical_json
from storage.listings import ListedObject, list_with_times
from storage.manifest import read_record
from storage.store import Store

_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_DIGITS = re.compile(r"digits-[0-9a-f]{12}")  # shards that a run made by itself (data.kind: digits)
_NAME = re.compile(rf"{_FINGERPRINT.pattern}|data/{_DIGITS.pattern}")
# Folders of one fingerprint each. What lies elsewhere is never touched: runs are users' to delete,
# and indices of patterns spare reading whole corpora again.
_FOLDERS = (
    *("models", "predictions", "labelings", "descriptors", "guards", "selections"),
    *("compact", "evaluations"),
)
_WITH_MANIFEST = ("labelings", "guards", "selections", "compact", "evaluations")
_MANIFEST, _SPECIFICATION = "manifest.json", "specification.json"
# Each says of what lies beside it, or below, that it is whole.
_COMMITS = ("/manifest.json", "/prepared.txt")
_LOCATIONS = ".locations.json"


@dataclass(frozen=True)
class Unit:
    """What is deleted together or not at all.

    Attributes:
        path: folder, or common beginning of the files, relative to the store.
        names: by which records refer to it; none for what was left over.
        objects: sorted by path.
    """

    path: str
    names: frozenset[str]
    objects: tuple[ListedObject, ...]

    @property
    def folder(self) -> str:
        """The folder of the store that it lies in, such as `models`."""
        return self.path.partition("/")[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of all objects."""
        return sum(one.size for one in self.objects)

    @property
    def modified(self) -> float | None:
        """When the newest object was written; None where a time is not known, or without any."""
        times = [one.modified for one in self.objects if one.modified is not None]
        return max(times) if len(times) == len(self.objects) > 0 else None

    def is_older(self, limit: float) -> bool:
        """Return whether every object was written before a time; one of unknown age was not."""
        return all(one.modified is not None and one.modified < limit for one in self.objects)

    def has(self, name: str) -> bool:
        """Return whether it has a file of this name directly in its folder."""
        path = f"{self.path}/{name}"
        return any(one.path == path for one in self.objects)


def list_units(store: Store) -> list[Unit]:
    """Return all units of a store."""
    units: list[Unit] = []
    for folder in _FOLDERS:
        for name, found in _grouped(store, folder).items():
            if not _FINGERPRINT.fullmatch(name):
                continue
            path = f"{folder}/{name}"
            unit = Unit(path, frozenset({name}), tuple(found))
            attempts = [one for one in found if one.path.startswith(f"{path}/attempts/")]
            # Once the model is committed nobody goes on from a checkpoint: leftovers of a kill.
            if attempts and unit.has(_MANIFEST):
                rest = tuple(one for one in found if one not in set(attempts))
                unit = Unit(path, frozenset({name}), rest)
                units.append(Unit(f"{path}/attempts", frozenset(), tuple(attempts)))
            units.append(unit)
    for name, found in _grouped(store, "data").items():
        if _DIGITS.fullmatch(name):
            units.append(Unit(f"data/{name}", frozenset({f"data/{name}"}), tuple(found)))
    for folder, suffixes in (
        ("corpora", (_LOCATIONS, ".json")),
        ("initial_weights", (".safetensors",)),
    ):
        units += _units_of_files(store, folder, suffixes)
    units += [Unit(one.path, frozenset(), (one,)) for one in list_with_times(store, "probes")]
    return sorted(units, key=lambda unit: unit.path)


def temporary_files(store: Store, *, older_than_seconds: float) -> list[str]:
    """Return the paths of files that killed writers left on a local store; none elsewhere."""
    folder = objects.local_path(store.url)
    if folder is None:
        return []
    found = local_files.leftovers(folder, older_than_seconds=older_than_seconds)
    return [file.relative_to(folder).as_posix() for file in found]


def names_in(data: bytes) -> set[str]:
    """Return every name in a record that could be a unit's."""
    return set(_NAME.findall(data.decode("utf-8", errors="replace")))


def references(store: Store, unit: Unit) -> set[str]:
    """Return the names of what a unit needs to be of use.

    A finished model needs nothing: what it was trained on is its history. One that is ordered needs
    what it is to be trained on, and every other finished stage what it was made of.

    Raises: CorruptRecord if a record is damaged, for what it refers to is then not known.
    """
    if unit.folder == "models" and not unit.has(_MANIFEST):
        return _names_of(store, unit, _SPECIFICATION)
    if unit.folder in _WITH_MANIFEST:
        return _names_of(store, unit, _MANIFEST)
    if unit.folder == "corpora":
        body = read_record(store, f"{unit.path}{_LOCATIONS}")
        return set() if body is None else names_in(canonical_json(body))
    return set()


def is_imported(store: Store, unit: Unit) -> bool:
    """Return whether a unit is a model that a user put into the store; no run can make it again."""
    if unit.folder != "models" or not unit.has(_MANIFEST):
        return False
    manifest = read_record(store, f"{unit.path}/{_MANIFEST}")
    return manifest is not None and manifest.get("kind") == "import"


def reachable(
    store: Store,
    units: Iterable[Unit],
    roots: Iterable[str],
    implied: Callable[[Unit], Iterable[str]],
) -> set[str]:
    """Return the names that are reached from others by references, roots included.

    Args:
        store: that holds the units.
        units: all there are.
        roots: names to begin with; those of no unit are harmless.
        implied: names that go with a unit although no record of it says so.
    """
    by_name: Mapping[str, list[Unit]] = defaultdict(list)
    for unit in units:
        for name in unit.names:
            by_name[name].append(unit)
    found: set[str] = set()
    pending = set(roots)
    while pending:
        name = pending.pop()
        if name in found:
            continue
        found.add(name)
        for unit in by_name.get(name, ()):
            pending |= references(store, unit) | set(implied(unit))
    return found


def in_order_of_deletion(unit: Unit) -> list[list[str]]:
    """Return the paths of a unit in groups, each to be gone before the next is touched.

    What says that the unit is whole goes first, then the records of parts, then the data: half
    deleted, it is a unit that nobody has finished.
    """
    groups: list[list[str]] = [[], [], []]
    for one in unit.objects:
        is_record = one.path.endswith((".json", ".txt"))
        groups[0 if one.path.endswith(_COMMITS) else 1 if is_record else 2].append(one.path)
    return [group for group in groups if group]


def listed_again(store: Store, unit: Unit) -> Unit:
    """Return the unit as it is now; without objects if it is gone."""
    if unit.folder in ("corpora", "initial_weights", "probes"):
        folder = unit.path.rpartition("/")[0]
        paths = {one.path for one in unit.objects}
        found = [one for one in list_with_times(store, folder) if one.path in paths]
    else:
        found = list_with_times(store, unit.path)
        if unit.names:
            found = [one for one in found if not _is_left_over(unit, one)]
    return Unit(unit.path, unit.names, tuple(found))


def _is_left_over(unit: Unit, one: ListedObject) -> bool:
    return unit.has(_MANIFEST) and one.path.startswith(f"{unit.path}/attempts/")


def _names_of(store: Store, unit: Unit, file: str) -> set[str]:
    body = read_record(store, f"{unit.path}/{file}") if unit.has(file) else None
    return set() if body is None else names_in(canonical_json(body))


def _grouped(store: Store, folder: str) -> dict[str, list[ListedObject]]:
    groups: dict[str, list[ListedObject]] = defaultdict(list)
    for one in list_with_times(store, folder):
        name, slash, _ = one.path.removeprefix(f"{folder}/").partition("/")
        if slash:
            groups[name].append(one)
    return groups


def _units_of_files(store: Store, folder: str, suffixes: tuple[str, ...]) -> list[Unit]:
    groups: dict[str, list[ListedObject]] = defaultdict(list)
    for one in list_with_times(store, folder):
        file = one.path.removeprefix(f"{folder}/")
        suffix = next((suffix for suffix in suffixes if file.endswith(suffix)), None)
        name = file.removesuffix(suffix or "")
        if suffix is not None and _FINGERPRINT.fullmatch(name):
            groups[name].append(one)
    return [
        Unit(f"{folder}/{name}", frozenset({name}), tuple(found)) for name, found in groups.items()
    ]
