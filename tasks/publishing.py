"""Write predictions or a selection to a folder for people: Parquet by shard, and an index.

The folder belongs to one labeler, and to one set of rules: anything else in it is refused. What is
there already is not written again, so a corpus that grew adds the files of its new shards.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from storage.addresses import canonical_json
from storage.corpus import Corpus
from storage.manifest import Manifest, StoredObject, check_schema, read_stored
from storage.objects import (
    delete_object,
    join_url,
    list_objects,
    local_path,
    read_object,
    write_object,
)
from storage.prediction_columns import telling_damage
from storage.predictions import prediction_record, read_predictions
from storage.published import published_predictions, published_selection
from storage.selections import from_parquet
from storage.store import Store
from tasks.judged_predictions import judged
from tasks.progress import Progress, report
from tasks.selection import read_summary
from tasks.shard_records import read_of_each

INDEX_SCHEMA = 1
INDEX_FILE = "index.json"
PARTS_FOLDER = "shards"
_SUMMARY_FACTS = (
    *("samples", "kept", "unique", "coverage", "precision", "reasons", "classes"),
    *("temperature", "ece_before", "ece_after"),
)
_IN_WORDS = {"predictions": "predictions", "selection": "a selection"}
_THREADS = 4


class OutputMismatch(ValueError):
    """A folder that holds something else than what is to be written there."""


@dataclass(frozen=True)
class Part:
    """One shard's file.

    Attributes:
        stem: of the shard.
        digest: of the shard.
        samples: rows, before any are left out.
        source: sha256 of the stored file that it is made of.
    """

    stem: str
    digest: str
    samples: int
    source: str

    @property
    def file(self) -> str:
        """Path in the folder. Parquet readers pass over names that begin with `.` or `_`."""
        return f"{PARTS_FOLDER}/part-{self.stem}.parquet"

    def to_json(self) -> dict[str, Any]:
        """Return the form in the index."""
        return asdict(self) | {"file": self.file}


@dataclass(frozen=True)
class Publication:
    """What was written.

    Attributes:
        index: as it is in index.json.
        num_written: files written now; the others were there.
    """

    index: dict[str, Any]
    num_written: int

    def to_json(self, out: str) -> dict[str, Any]:
        """Return the index without its list of files, and what was written now."""
        facts = {name: value for name, value in self.index.items() if name != "parts"}
        counts = {"files": len(self.index["parts"]), "files_written": self.num_written}
        return facts | counts | {"out": out}


def read_publication(
    out: str, kind: str, expected: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """Return the index of a folder that was written here, None if there is none.

    Raises: OutputMismatch if it is of another kind, or holds other values than are expected;
        UnknownSchema of a newer version.
    """
    url = join_url(_absolute(out), INDEX_FILE)
    try:
        index = json.loads(read_object(url))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise OutputMismatch(f"{url} is not an index of selftrain: {error}") from error
    if not isinstance(index, dict) or index.get("kind") not in _IN_WORDS:
        raise OutputMismatch(f"{url} is not an index of selftrain: choose another folder")
    check_schema(index, INDEX_SCHEMA, where=url)
    if index["kind"] != kind:
        raise OutputMismatch(
            f"{out} holds {_IN_WORDS[index['kind']]}, not {_IN_WORDS[kind]}: choose another folder"
        )
    for name, wanted in (expected or {}).items():
        if canonical_json(index.get(name)) != canonical_json(wanted):
            raise OutputMismatch(
                f"{out} holds {_IN_WORDS[kind]} of something else: {name} is {index.get(name)!r}"
                f" there, {wanted!r} asked for. Choose another folder, or delete this one"
            )
    return index


def publish_predictions(
    store: Store,
    labeling: Manifest,
    corpus: Corpus,
    out: str,
    *,
    class_names: Sequence[str],
    facts: Mapping[str, Any],
    has_log_probs: bool,
) -> Publication:
    """Write a finished labelling to a folder or URL.

    Args:
        store: that holds it.
        labeling: its manifest.
        corpus: that was labelled.
        out: folder or URL.
        class_names: by class number.
        facts: more for the index.
        has_log_probs: keep them in the files.
    Raises: OutputMismatch if the folder is of another labeler.
    """
    labeler = labeling.inputs["labeler"].fingerprint
    found = read_of_each(
        corpus.shards, lambda shard: prediction_record(store, labeler, shard.digest)
    )
    objects = {shard.digest: StoredObject(**record["object"]) for shard, record in found}

    def write(part: Part) -> bytes:
        with telling_damage():
            data = read_stored(store, objects[part.digest])
        return published_predictions(
            data,
            stem=part.stem,
            class_names=class_names,
            has_log_probs=has_log_probs,
        )

    parts = [
        Part(shard.stem, shard.digest, record["num_samples"], objects[shard.digest].sha256)
        for shard, record in found
    ]
    identity = {"kind": "predictions", "labeler": labeler, "log_probs": has_log_probs}
    body = {
        "store": store.url,
        "labeling": labeling.fingerprint,
        "corpus": corpus.digest,
        "class_names": list(class_names),
        "samples": labeling.counts["samples"],
        "labeled": labeling.counts["labeled"],
        "bad_samples": labeling.counts["bad_samples"],
        **facts,
    }
    return _publish(out, identity, body, parts, write)


def publish_selection(
    store: Store,
    labeling: Manifest,
    selection: Manifest,
    corpus: Corpus,
    out: str,
    *,
    class_names: Sequence[str],
    facts: Mapping[str, Any],
    has_rejected: bool,
) -> Publication:
    """Write a finished selection, and its summary.json, to a folder or URL.

    Args:
        store: that holds it.
        labeling: that it was made of.
        selection: its manifest.
        corpus: that was labelled.
        out: folder or URL.
        class_names: by class number.
        facts: more for the index.
        has_rejected: keep rejected rows in the files, with their reasons.
    Raises: OutputMismatch if the folder is of another labeler or of other rules.
    """
    labeler = labeling.inputs["labeler"].fingerprint
    summary = read_summary(store, selection)
    objects = {one.name: one for one in selection.objects}

    def write(part: Part) -> bytes:
        predictions = read_predictions(store, prediction_record(store, labeler, part.digest))
        _, confidences = judged(predictions, summary)
        stored = objects[part.digest]
        chosen = from_parquet(
            read_stored(store, stored),
            num_samples=predictions.num_samples,
            where=store.url_of(stored.path),
        )
        by_key = dict(zip(predictions.keys, confidences.tolist(), strict=True))
        return published_selection(
            chosen,
            stem=part.stem,
            class_names=class_names,
            confidences=np.array([by_key[key] for key in chosen.keys], np.float32),
            has_rejected=has_rejected,
        )

    parts = [
        Part(
            shard.stem,
            shard.digest,
            labeling.counts["shards"][shard.stem]["num_samples"],
            objects[shard.digest].sha256,
        )
        for shard in corpus.shards
    ]
    identity = {
        "kind": "selection",
        "labeler": labeler,
        "rules": selection.settings,
        "rejected": has_rejected,
    }
    body = {
        "store": store.url,
        "labeling": labeling.fingerprint,
        "selection": selection.fingerprint,
        "corpus": corpus.digest,
        "class_names": list(class_names),
        **{name: summary[name] for name in _SUMMARY_FACTS if name in summary},
        **facts,
    }
    published = _publish(out, identity, body, parts, write)
    write_object(join_url(_absolute(out), "summary.json"), _json(summary), "replace")
    return published


def _publish(
    out: str,
    identity: dict[str, Any],
    body: dict[str, Any],
    parts: Sequence[Part],
    write: Callable[[Part], bytes],
) -> Publication:
    """Write the parts that are not there, delete those that are no more, and then the index."""
    base = _absolute(out)
    kind = identity["kind"]
    old = read_publication(out, kind, identity)
    if old is None:
        _refuse_foreign_files(base)
    there = {part["file"]: part for part in old["parts"]} if old else {}
    index = {"schema": INDEX_SCHEMA, **identity, **body}
    # Claims the folder; whoever is stopped before the end finds it his own.
    index_url = join_url(base, INDEX_FILE)
    unfinished = {**index, "complete": False, "parts": list(there.values())}
    write_object(index_url, _json(unfinished), "replace")
    existing = {f"{PARTS_FOLDER}/{name}" for name in list_objects(join_url(base, PARTS_FOLDER))}
    missing = [
        part
        for part in parts
        if there.get(part.file) != part.to_json() or part.file not in existing
    ]
    with ThreadPoolExecutor(_THREADS) as pool:

        def put(part: Part) -> None:
            write_object(join_url(base, part.file), write(part), "replace")

        for number, _ in enumerate(pool.map(put, missing), start=1):
            report(Progress(f"write {kind}", number, len(missing), "files"))
    for file in there.keys() - {part.file for part in parts}:
        delete_object(join_url(base, file))
    index |= {"complete": True, "parts": [part.to_json() for part in parts]}
    write_object(index_url, _json(index), "replace")
    return Publication(index, len(missing))


def _refuse_foreign_files(base: str) -> None:
    found = list_objects(join_url(base, PARTS_FOLDER))
    if found:
        raise OutputMismatch(
            f"{join_url(base, PARTS_FOLDER)} holds {len(found)} files, first {found[0]!r}, but"
            f" there is no {INDEX_FILE} of selftrain above it: choose another folder"
        )


def _absolute(out: str) -> str:
    local = local_path(out)
    return out.rstrip("/") if local is None else str(local.resolve())


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()
