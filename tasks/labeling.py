"""Label a corpus: one Parquet of predictions per shard, addressed by labeler and shard content."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from storage.addresses import (
    canonical_json_of_parsed,
    fingerprint,
    prediction_folder,
    settings_of,
    sha256_hex,
)
from storage.corpus import (
    Corpus,
    Shard,
    cached_corpus,
    load_corpus,
    load_locations,
    read_samples,
)
from storage.damaged_predictions import Verification, read_whole_record
from storage.manifest import (
    InputReference,
    Manifest,
    ManifestMismatch,
    commit_manifest,
    create_record,
)
from storage.manifest import read_record as read_stored_record
from storage.predictions import (
    SCHEMA_VERSION,
    TOP_K_VERSION,
    UNKNOWN_LABEL,
    read_record,
    write_predictions,
)
from storage.samples import in_shard_key, sample_key
from storage.store import Store
from tasks import provenance
from tasks.batch_sizes import find_batch_size
from tasks.ensembles import Ensemble
from tasks.images import CONVERSION
from tasks.labeling_config import LabelingConfig, resolved_form
from tasks.overlapping import read_ahead, write_behind
from tasks.predicting import Cut, Predicted, predict_shards
from tasks.shard_items import BadSampleBudget
from tasks.shard_records import read_of_each
from tasks.specifications import Specification, folder_of
from tasks.view_batches import OpenShard

VERSION = 1
LABELER_VERSION = 2

_log = logging.getLogger(__name__)


class LabelingStopped(Exception):
    """A labelling was asked to stop; every finished shard is recorded."""


def labeler_fingerprint(
    config: LabelingConfig,
    *,
    teacher: str,
    view: dict[str, Any],
    class_names: Sequence[str],
    validation: str | None = None,
    more_teachers: Mapping[str, dict[str, Any]] | None = None,
) -> str:
    """Return the address of everything that makes a prediction, save the image.

    Args:
        config: how to label.
        teacher: fingerprint of the model.
        view: the clean view's image_size, crop_padding and interpolation.
        class_names: the label space in the run's order.
        validation: fingerprint of the teacher's, whose temperature the top_k form is calibrated
            by; the full form does not read it.
        more_teachers: of an ensemble, fingerprint to clean view; their order means nothing.
    Raises: ValueError for the top_k form without a validation, and for settings without effect.
    """
    teachers = {teacher: view, **(more_teachers or {})}
    config.check_members(len(teachers))
    chosen = settings_of(config)
    settings = {
        **chosen,
        "form": resolved_form(config, len(class_names)),
        "view": view,
        "class_names": list(class_names),
        "conversion": CONVERSION,
        "aggregation": "none" if config.num_members(len(teachers)) == 1 else config.aggregate,
        "predictions_schema": SCHEMA_VERSION,
    }
    if "view" in chosen:
        settings["views"] = chosen["view"]
    inputs = {"teacher": teacher}
    if len(teachers) > 1:
        settings["view"] = [teachers[one] for one in sorted(teachers)]
        inputs = {f"teacher_{i}": one for i, one in enumerate(sorted(teachers))}
    if settings["form"] == "top_k":
        if validation is None:
            raise ValueError(
                f"labeling.form={config.form} with {len(class_names)} classes stores the top"
                f" {config.k}, calibrated by the dev split, but no validation of the model is"
                " given: name one, or use form=full"
            )
        settings |= {"k": config.k, "predictions_schema": TOP_K_VERSION}
        inputs["validation"] = validation
    return fingerprint("labeler", LABELER_VERSION, settings, inputs)


def specify(*, labeler: str, corpus: str) -> Specification:
    """Return the specification of labelling one corpus."""
    return Specification("label", VERSION, {}, {"labeler": labeler, "corpus": corpus})


def resolve_batch_size(
    store: Store,
    labeler: str,
    config: LabelingConfig,
    *,
    device: torch.device,
    predict: Callable[[int], object],
) -> int:
    """Return the batch size of this labeler: the first to ask decides, and it is written down.

    Args:
        store: where it is written down.
        labeler: address of the predictions.
        config: with the size that is asked for, or `auto`.
        device: where to compute.
        predict: computes a batch of so many images, to find out what is fast and fits.
    """
    path = f"{prediction_folder(labeler)}/resolved.json"
    resolved = read_stored_record(store, path)
    if resolved is None:
        wanted = config.batch_size
        if wanted == "auto":
            wanted = find_batch_size(device, predict)
        body = {"schema": 1, "labeler": labeler, "batch_size": wanted}
        resolved = create_record(store, path, body)
    there = resolved["batch_size"]
    if config.batch_size not in ("auto", there):
        _log.warning(
            "labeling.batch_size=%d has no effect: labeler %s began with %d, and all its shards are"
            " labelled alike",
            config.batch_size,
            labeler[:12],
            there,
        )
    return there


def shards_to_label(
    store: Store, labeler: str, corpus: Corpus, *, verify: Verification | None = None
) -> list[Shard]:
    """Return the shards without whole predictions of this labeler, in the corpus's order.

    Args:
        store: holds the predictions.
        labeler: whose.
        corpus: the shards in question.
        verify: look at the objects that records name, too, and withdraw the records of damaged
            ones; None: a record is enough.
    """
    return _without_record(store, labeler, corpus.shards, verify=verify)


def _without_record(
    store: Store, labeler: str, shards: Sequence[Shard], *, verify: Verification | None = None
) -> list[Shard]:
    def record_of(shard: Shard) -> dict[str, Any] | None:
        if verify is None:
            return read_record(store, labeler, shard.digest)
        return read_whole_record(store, labeler, shard.digest, verify=verify)

    return [shard for shard, found in read_of_each(shards, record_of) if found is None]


def label_shards(
    store: Store,
    corpus_digest: str,
    stems: list[str],
    ensemble: Ensemble,
    *,
    labeler: str,
    batch_size: int,
    max_bad_samples: int,
    cut: Cut | None = None,
    decode_processes: int = 0,
) -> Iterator[int]:
    """Label shards one by one and yield the number of samples of each once it is committed.

    One shard is read ahead and one written behind. Shards that are recorded already are passed
    over and come first. With `cut` the top_k form is stored, else the full one. Beside a GPU
    `decode_processes` of this process's children feed it.

    Raises: TooManyBadSamples, MissingShard, CorruptShard.
    """
    corpus = cached_corpus(store, corpus_digest)
    locations = load_locations(store, corpus_digest)
    truth = _Truth(corpus, ensemble.class_names)

    def read(shard: Shard) -> OpenShard:
        samples = read_samples(corpus, locations, shard.stem)
        return OpenShard(shard.digest, samples, BadSampleBudget(shard.stem, max_bad_samples))

    def write(labeled: tuple[OpenShard, Predicted]) -> int:
        opened, predicted = labeled
        predictions, prob_sums = predicted.to_predictions(
            [truth.of(label) for label in predicted.labels], cut=cut
        )
        shard = corpus.shard(opened.budget.stem)
        reasons = sorted(opened.budget.reasons.items())
        bad = {in_shard_key(key, shard.stem): reason for key, reason in reasons}
        calibrated = {} if cut is None else {"temperature": cut.temperature}
        write_predictions(
            store,
            labeler,
            shard.digest,
            predictions,
            {"bad_samples": bad, **calibrated},
            prob_sums=prob_sums,
        )
        return shard.num_samples

    # A group that is tried again goes on where it broke off.
    wanted = [corpus.shard(stem) for stem in stems]
    missing = _without_record(store, labeler, wanted)
    missing_stems = {shard.stem for shard in missing}
    for shard in wanted:
        if shard.stem not in missing_stems:
            yield shard.num_samples
    labeled = predict_shards(
        read_ahead(missing, read),
        ensemble,
        batch_size=batch_size,
        decode_processes=decode_processes if missing else 0,
    )
    yield from write_behind(labeled, write)


class _Truth:
    """True labels of unlabelled shards in the run's class order: diagnosis only."""

    def __init__(self, corpus: Corpus, class_names: tuple[str, ...]) -> None:
        positions = {name: position for position, name in enumerate(class_names)}
        names = corpus.class_names or ()
        self._mapped = [positions.get(name, UNKNOWN_LABEL) for name in names]

    def of(self, label: int | None) -> int:
        if label is None or label >= len(self._mapped):
            return UNKNOWN_LABEL
        return self._mapped[label]


def finish(
    store: Store, specification: Specification, *, seconds: float, processes: int = 1
) -> Manifest:
    """Commit a labelling once every shard of the corpus has its record.

    One that is finished already, and was mended, stays as it is.

    Args:
        store: where to.
        specification: of the labelling.
        seconds: of this attempt.
        processes: that labelled at a time in this attempt.
    Raises: ValueError if a record is missing; ManifestMismatch if a mended shard's record is not
        the one that the finished labelling names.
    """
    labeler = specification.inputs["labeler"]
    corpus = load_corpus(store, specification.inputs["corpus"])
    found = read_of_each(corpus.shards, lambda s: read_record(store, labeler, s.digest))
    missing = [shard.stem for shard, record in found if record is None]
    if missing:
        raise ValueError(
            f"labelling {specification.fingerprint[:12]}: {len(missing)} of {len(found)} shards"
            f" have no record, first {missing[0]}; run it again to label them"
        )
    records = [(shard, record) for shard, record in found if record is not None]
    there = specification.result(store)
    if there is not None:
        check_records(store, there, records)
        return there
    shards = {
        shard.stem: {
            "record_sha256": _checksum(record),
            "num_samples": record["num_samples"],
        }
        for shard, record in records
    }
    bad = {
        sample_key(shard.stem, key): reason
        for shard, record in records
        for key, reason in record["facts"]["bad_samples"].items()
    }
    manifest = Manifest(
        kind=specification.kind,
        fingerprint=specification.fingerprint,
        stage_version=specification.version,
        settings=specification.settings,
        inputs={
            "labeler": InputReference(labeler, labeler),
            "corpus": InputReference(corpus.digest, corpus.digest),
        },
        objects=(),
        counts={
            "samples": corpus.num_samples,
            "labeled": sum(record["num_samples"] for _, record in records),
            "bytes": sum(record["object"]["size"] for _, record in records),
            "bad_samples": bad,
            "shards": shards,
        },
    )
    provenance.record(
        store, specification.folder, seconds=seconds, device=None, processes=processes
    )
    return commit_manifest(store, specification.folder, manifest)


def check_records(
    store: Store, labeling: Manifest, records: Iterable[tuple[Shard, Mapping[str, Any]]]
) -> None:
    """Check that predictions are still those that a finished labelling names.

    They are others where a shard was labelled again because its predictions were lost or damaged,
    and came out otherwise, as they do on another type of device.

    Raises: ManifestMismatch.
    """
    named = labeling.counts["shards"]
    checksums = ((shard.stem, _checksum(record)) for shard, record in records)
    others = [(stem, found) for stem, found in checksums if found != named[stem]["record_sha256"]]
    if others:
        stem, found = others[0]
        folder = store.url_of(folder_of(labeling.kind, labeling.fingerprint))
        raise ManifestMismatch(
            f"{folder}/manifest.json: the predictions of {len(others)} shards are not those that it"
            f" names; first {stem}: record {named[stem]['record_sha256']} is named, {found} is"
            " there. They were labelled again, on another type of device or under other library"
            f" versions than {folder}/provenance.json tells of. Delete the manifest to go on from"
            " what is there now"
        )


def _checksum(record: Mapping[str, Any]) -> str:
    return sha256_hex(canonical_json_of_parsed(record))  # records are read back
