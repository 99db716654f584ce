"""What a stage is asked to compute, and where its result lies."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from storage import addresses
from storage.manifest import Manifest, read_manifest
from storage.store import Store

_FOLDERS: dict[str, Callable[[str], str]] = {
    "import": addresses.model_folder,
    "train": addresses.model_folder,
    "label": addresses.labeling_folder,
    "guard": addresses.guard_folder,
    "select": addresses.selection_folder,
    "validate": addresses.evaluation_folder,
    "promote": addresses.evaluation_folder,
    "materialize": addresses.compact_folder,
    "test": addresses.evaluation_folder,
}


@dataclass(frozen=True)
class Specification:
    """A stage before it is run: its fingerprint is known without computing anything.

    Attributes:
        kind: the stage, e.g. "train".
        version: the stage's version constant; raised when its results change.
        settings: everything that affects the result, as JSON.
        inputs: name -> fingerprint (or corpus digest) of what the stage reads.
    """

    kind: str
    version: int
    settings: dict[str, Any]
    inputs: dict[str, str]

    @cached_property
    def fingerprint(self) -> str:
        """64 hexadecimal digits that name this specification in every store."""
        return addresses.fingerprint(self.kind, self.version, self.settings, self.inputs)

    @property
    def folder(self) -> str:
        """Folder of the result, relative to the store."""
        return folder_of(self.kind, self.fingerprint)

    def record_path(self, digest: str) -> str:
        """Return the path of what the stage records of one shard or group, relative to the store.

        Args:
            digest: of the shard, or of the digests of the group's shards.
        """
        return f"{self.folder}/shards/{digest}.json"

    def result(self, store: Store) -> Manifest | None:
        """Return the committed result, verified, or None where there is none yet."""
        return read_result(store, self.kind, self.fingerprint)


def folder_of(kind: str, fingerprint: str) -> str:
    """Return the folder of a stage's result, relative to the store."""
    return _FOLDERS[kind](fingerprint)


def read_result(store: Store, kind: str, fingerprint: str) -> Manifest | None:
    """Return the committed result of a stage, verified, or None where there is none yet."""
    return read_manifest(store, folder_of(kind, fingerprint), expect_fingerprint=fingerprint)


def finished_result(store: Store, kind: str, fingerprint: str) -> Manifest:
    """Return the committed result of a stage that must be there.

    Raises: ValueError if the stage is not finished.
    """
    manifest = read_result(store, kind, fingerprint)
    if manifest is None:
        folder = store.url_of(folder_of(kind, fingerprint))
        raise ValueError(f"{folder} is not finished: run that stage first")
    return manifest
