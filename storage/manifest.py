"""Sealed records and manifests: data first, manifest last, its presence is the commit."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError

from storage import crash_points
from storage.addresses import canonical_json, canonical_json_of_parsed, sha256_hex
from storage.objects import CHECKSUM_READS
from storage.store import CorruptObject, ObjectsTogether, Store

MANIFEST_SCHEMA = 1
_FORBID_EXTRA = ConfigDict(extra="forbid")


class CorruptRecord(Exception):
    """A record or manifest is not what was written."""


class ManifestMismatch(Exception):
    """A manifest is there, but of something else than what was asked for."""


class UnknownSchema(Exception):
    """A record was written by a newer version of selftrain."""


@dataclass(frozen=True)
class StoredObject:
    """A data object that a manifest or record names.

    Attributes:
        name: what it is called in its manifest, for example ``model``.
        path: relative to the store; holds the sha256.
        size: in bytes.
        sha256: of the bytes.
    """

    __pydantic_config__ = _FORBID_EXTRA

    name: str
    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class InputReference:
    """An input of a stage: its fingerprint, and the sha256 of the manifest that was read."""

    __pydantic_config__ = _FORBID_EXTRA

    fingerprint: str
    manifest_sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a finished stage left, and nothing that differs between two honest computations.

    Attributes:
        kind: the stage.
        fingerprint: of the stage's specification.
        stage_version: the constant beside the stage.
        settings: those that are in the fingerprint.
        inputs: role -> reference.
        objects: the stage's data objects.
        counts: what was counted, JSON only.
        schema: version of this form.
    """

    __pydantic_config__ = _FORBID_EXTRA

    kind: str
    fingerprint: str
    stage_version: int
    settings: dict[str, Any]
    inputs: dict[str, InputReference]
    objects: tuple[StoredObject, ...]
    counts: dict[str, Any] = field(default_factory=dict[str, Any])
    schema: int = MANIFEST_SCHEMA

    @property
    def sha256(self) -> str:
        """The checksum that is stored in the manifest, by which others refer to it."""
        return sha256_hex(canonical_json(_body(self)))

    def object(self, name: str) -> StoredObject:
        """Return the data object of this name; KeyError lists the known ones."""
        for stored in self.objects:
            if stored.name == name:
                return stored
        known = ", ".join(stored.name for stored in self.objects) or "none"
        raise KeyError(
            f"manifest {self.kind} {self.fingerprint} has no object {name!r}; known: {known}"
        )


_manifest_form = TypeAdapter(Manifest)


def sealed(body: Mapping[str, Any]) -> bytes:
    """Return canonical JSON of the body with its own checksum under the key ``sha256``."""
    if "sha256" in body:
        raise ValueError('a record\'s body must not hold the key "sha256", which is its seal')
    return canonical_json({**body, "sha256": sha256_hex(canonical_json(body))})


def unsealed(data: bytes, *, where: str) -> dict[str, Any]:
    """Return the body of a sealed record after checking its seal.

    Raises: CorruptRecord, naming `where`, for anything that `sealed` would not have written.
    """
    try:
        value: object = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as error:
        raise CorruptRecord(f"{where}: not a record of selftrain: {error}") from error
    if not isinstance(value, dict):
        raise CorruptRecord(f"{where}: not a record of selftrain: a {type(value).__name__}")
    body = cast("dict[str, Any]", value)
    seal = body.pop("sha256", None)
    try:
        found = sha256_hex(canonical_json_of_parsed(body))
    except (ValueError, RecursionError) as error:
        raise CorruptRecord(f"{where}: not a record of selftrain: {error}") from error
    if seal != found:
        raise CorruptRecord(
            f"{where}: the contents have sha256 {found}, but the record says {seal}; it is damaged "
            "or was edited. Delete it to have it computed anew"
        )
    return body


def create_record(store: Store, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """Write a sealed record if none is there, and return the body of the one that is there now."""
    there = store.create(path, sealed(body))
    try:
        return unsealed(there, where=store.url_of(path))
    except CorruptRecord:
        again = read_record(store, path)
        if again is None:
            raise
        return again


def read_record(store: Store, path: str) -> dict[str, Any] | None:
    """Return the body of a sealed record, None if there is none.

    A record whose seal differs is read again, because bits flip on the way.

    Raises: CorruptRecord if it still differs.
    """
    where = store.url_of(path)
    for attempt in range(1, CHECKSUM_READS + 1):
        try:
            return unsealed(store.read(path), where=where)
        except FileNotFoundError:
            return None
        except CorruptRecord:
            if attempt == CHECKSUM_READS:
                raise
    raise AssertionError("unreachable")


def put_object(
    store: Store | ObjectsTogether,
    folder: str,
    name: str,
    data: bytes | bytearray | memoryview,
    suffix: str,
    *,
    crash_kind: str | None = None,
) -> StoredObject:
    """Write a data object as ``<folder>/<name>-<sha256>.<suffix>`` and return its reference.

    Args:
        store: where to.
        folder: the stage's folder.
        name: of the object in its manifest.
        data: the whole contents.
        suffix: without the dot.
        crash_kind: the stage's kind; reaches the crash point ``<kind>.before_data``.
    """
    if crash_kind is not None:
        crash_points.reach(f"{crash_kind}.before_data")
    sha256 = sha256_hex(data)
    path = f"{folder}/{name}-{sha256}.{suffix}"
    store.put(path, data)
    return StoredObject(name, path, len(data), sha256)


def read_stored(store: Store, stored: StoredObject) -> bytes:
    """Return the bytes of a data object, verified against its size and checksum."""
    data = store.read(stored.path, sha256=stored.sha256)
    if len(data) != stored.size:
        raise CorruptObject(
            f"{store.url_of(stored.path)}: {len(data)} bytes, but its manifest says {stored.size}"
        )
    return data


def commit_manifest(store: Store, folder: str, manifest: Manifest) -> Manifest:
    """Write the manifest if none is there and return the one that is: it is the truth.

    Of two drivers that computed the same stage, both return the winner's manifest.

    Raises: ManifestMismatch if the one that is there has another kind, fingerprint, stage version,
        settings or inputs (their fingerprints); both values are named.
    """
    crash_points.reach(f"{manifest.kind}.before_manifest")
    path = _manifest_path(folder)
    there = _parsed(create_record(store, path, _body(manifest)), store.url_of(path))
    wanted, found = _specification(manifest), _specification(there)
    for key, value in wanted.items():
        if canonical_json(value) != canonical_json(found[key]):
            raise _mismatch(store.url_of(path), key, found[key], value)
    crash_points.reach(f"{manifest.kind}.after_manifest")
    return there


def read_manifest(
    store: Store, folder: str, *, expect_fingerprint: str | None = None
) -> Manifest | None:
    """Return the verified manifest of a finished stage, None if the stage is not finished.

    Raises: CorruptRecord; UnknownSchema; ManifestMismatch if its fingerprint is not the expected.
    """
    path = _manifest_path(folder)
    body = read_record(store, path)
    if body is None:
        return None
    manifest = _parsed(body, store.url_of(path))
    if expect_fingerprint is not None and manifest.fingerprint != expect_fingerprint:
        raise _mismatch(store.url_of(path), "fingerprint", manifest.fingerprint, expect_fingerprint)
    return manifest


def write_provenance(store: Store, folder: str, facts: Mapping[str, Any]) -> None:
    """Write (or replace) what differs between honest computations: time, host, versions."""
    store.replace(f"{folder}/provenance.json", sealed(facts))


def read_provenance(store: Store, folder: str) -> dict[str, Any] | None:
    """Return a stage's provenance, None if there is none."""
    return read_record(store, f"{folder}/provenance.json")


def check_schema(body: Mapping[str, Any], newest: int, *, where: str) -> None:
    """Raise UnknownSchema if a record is of a newer schema, CorruptRecord if it names none."""
    schema = body.get("schema")
    if type(schema) is not int or schema < 1:
        raise CorruptRecord(f"{where}: schema is {schema!r}, not a number from 1 to {newest}")
    if schema > newest:
        raise UnknownSchema(
            f"{where}: has schema {schema}, but this version of selftrain reads up to {newest}; "
            "update selftrain"
        )


def check_identity(body: Mapping[str, Any], wanted: Mapping[str, str], *, where: str) -> None:
    """Raise ManifestMismatch if a record is of something else than is asked for.

    Args:
        body: the record.
        wanted: name -> value of the fields that say what it is of.
        where: it lies.
    """
    for name, value in wanted.items():
        if body.get(name) != value:
            raise ManifestMismatch(
                f"{where}: {name} is {body.get(name)!r}, but {value!r} is asked for"
            )


def _body(manifest: Manifest) -> dict[str, Any]:
    # As `asdict` gives it, which copies all it meets: of thousands of objects most of the time.
    return vars(manifest) | {
        "inputs": {role: vars(item) for role, item in manifest.inputs.items()},
        "objects": [vars(stored) for stored in manifest.objects],
    }


def _manifest_path(folder: str) -> str:
    return f"{folder}/manifest.json"


def _parsed(body: Mapping[str, Any], where: str) -> Manifest:
    check_schema(body, MANIFEST_SCHEMA, where=where)
    try:
        return _manifest_form.validate_python(body)
    except ValidationError as error:
        raise CorruptRecord(f"{where}: not a manifest: {error}") from error


def _specification(manifest: Manifest) -> dict[str, Any]:
    return {
        "kind": manifest.kind,
        "fingerprint": manifest.fingerprint,
        "stage_version": manifest.stage_version,
        "settings": manifest.settings,
        "inputs": {role: item.fingerprint for role, item in manifest.inputs.items()},
    }


def _mismatch(where: str, key: str, found: object, wanted: object) -> ManifestMismatch:
    return ManifestMismatch(
        f"{where}: {key} is {found!r}, but {wanted!r} is asked for. The folder holds the result of "
        "something else; use another store, or delete the folder if nothing needs it"
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise ValueError(f"duplicate keys {twice}")
    return value


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")
