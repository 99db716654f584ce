"""Label a corpus: one Parquet of predictions per shard, addressed by labeler and shard content."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from models.aggregation import (
    Aggregate,
    McDropoutConfig,
    NoUncertaintyConfig,
    UncertaintyConfig,
)
from models.views import CleanViewConfig, ViewConfig, view_sizes
from storage.addresses import (
    canonical_json,
    fingerprint,
    prediction_folder,
    settings_of,
    sha256_hex,
)
from storage.corpus import Corpus, Shard, load_corpus, load_locations, read_samples
from storage.damaged_predictions import Verification, read_whole_record
from storage.manifest import InputReference, Manifest, commit_manifest, create_record
from storage.predictions import (
    SCHEMA_VERSION,
    TOP_K_VERSION,
    UNKNOWN_LABEL,
    Form,
    read_record,
    write_predictions,
)
from storage.samples import in_shard_key, sample_key
from storage.store import Store
from tasks import provenance
from tasks.ensembles import Ensemble, load_ensemble
from tasks.images import CONVERSION
from tasks.predicting import Cut, predict_samples
from tasks.shard_items import BadSampleBudget
from tasks.specifications import Specification

VERSION = 1
LABELER_VERSION = 1

MAX_FULL_CLASSES = 256
"""With labeling.form=auto: above it, most of the full form's bytes would be of classes that no
image is of."""

_IMAGE_BYTES_PER_BATCH = 256 * 2**20

_log = logging.getLogger(__name__)


class LabelingStopped(Exception):
    """A labelling was asked to stop; every finished shard is recorded."""


class LabelingConfig(BaseModel):
    """How teachers label: EMA weights, evaluation mode, by default the clean view."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="bf16: autocast of the forward pass; part of the address."
    )
    form: Literal["full", "top_k", "auto"] = Field(
        default="auto",
        description="full: the log-probability of every class is stored, as fp16. top_k: those of"
        " the k most probable classes and the mass of the rest, calibrated by the temperature of"
        " the dev split, which is fitted before labelling. auto: full up to 256 classes, else"
        " top_k.",
        json_schema_extra={"fingerprint": "excluded"},  # what it comes to is in it
    )
    k: int = Field(
        default=10,
        ge=1,
        description="Classes listed of each image where the form is top_k.",
        json_schema_extra={"fingerprint": "excluded"},  # in it where the form is top_k
    )
    view: ViewConfig = Field(
        default=CleanViewConfig(),
        description="What every teacher is shown of an image; predictions of several views are"
        " averaged.",
        json_schema_extra={"absent_means": {"kind": "clean"}},
    )
    aggregate: Aggregate = Field(
        default="mean_prob",
        description="How predictions of several views, teachers or passes become one: the mean of"
        " probabilities or of logits.",
        json_schema_extra={"absent_means": "mean_prob"},
    )
    uncertainty: UncertaintyConfig = Field(
        default=NoUncertaintyConfig(),
        description="Over what the standard deviation of the predicted class's probability is"
        " taken, for selection.threshold.kind uncertainty.",
        json_schema_extra={"absent_means": {"kind": "none"}},
    )
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto",
        description="Images a forward pass; batches never cross shards. auto is chosen once per"
        " labeler by image size and device, written down, and obeyed by every worker and resume.",
        json_schema_extra={"fingerprint": "excluded"},
    )
    shards_per_task: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto",
        description="Shards of one Prefect task; auto: minutes of work, at most 100 tasks a"
        " labelling.",
        json_schema_extra={"fingerprint": "excluded"},
    )
    verify: Verification = Field(
        default="full",
        description="How a labelling that goes on looks at predictions that are recorded already:"
        " full reads them and compares checksums, size only asks how long they are. Damaged ones"
        " are made again.",
        json_schema_extra={"fingerprint": "excluded"},
    )

    def num_members(self, num_teachers: int = 1) -> int:
        """Return how many predictions of an image are made and averaged."""
        uncertainty = self.uncertainty
        passes = uncertainty.passes if isinstance(uncertainty, McDropoutConfig) else 1
        return num_teachers * len(view_sizes(self.view, 1)) * passes

    def is_clean(self, num_teachers: int = 1) -> bool:
        """Return whether an image is predicted once, from the clean view, as a validation does."""
        return isinstance(self.view, CleanViewConfig) and self.num_members(num_teachers) == 1

    def for_dev(self) -> "LabelingConfig":
        """Return how dev is labelled to calibrate these labels: alike, all classes stored."""
        return self.model_copy(update={"form": "full"})

    def check_members(self, num_teachers: int = 1) -> None:
        """Raise ValueError if a setting cannot take effect with so many teachers."""
        num_views = len(view_sizes(self.view, 1))
        kind = self.uncertainty.kind
        if (kind == "views" and num_views < 2) or (kind == "teachers" and num_teachers < 2):
            raise ValueError(
                f"labeling.uncertainty={kind} is a deviation over {kind}, of which there is one:"
                f" take several {kind}, or mc_dropout"
            )
        if self.aggregate != "mean_prob" and self.num_members(num_teachers) == 1:
            raise ValueError(
                f"labeling.aggregate={self.aggregate}: one prediction is made of each image, so"
                " there is nothing to aggregate: leave it out, or choose a view"
            )


def resolved_form(config: LabelingConfig, num_classes: int) -> Form:
    """Return the form in which predictions of so many classes are stored.

    Raises: ValueError if there are fewer classes than are to be listed.
    """
    form = config.form
    if form == "auto":
        form = "full" if num_classes <= MAX_FULL_CLASSES else "top_k"
    if form == "top_k" and config.k > num_classes:
        raise ValueError(
            f"labeling.k={config.k} with labeling.form={config.form}: there are {num_classes}"
            " classes to list; lower it, or use form=full"
        )
    return form


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


def load_labeler(
    store: Store,
    config: LabelingConfig,
    models: Sequence[str],
    *,
    device: torch.device,
    class_names: Sequence[str],
) -> Ensemble:
    """Load the teachers of a labeler; see `load_ensemble`."""
    return load_ensemble(
        store,
        models,
        device=device,
        class_names=class_names,
        precision=config.precision,
        view=config.view,
        aggregate=config.aggregate,
        uncertainty=config.uncertainty,
    )


def specify(*, labeler: str, corpus: str) -> Specification:
    """Return the specification of labelling one corpus."""
    return Specification("label", VERSION, {}, {"labeler": labeler, "corpus": corpus})


def resolve_batch_size(
    store: Store,
    labeler: str,
    config: LabelingConfig,
    *,
    image_size: int,
    device: torch.device,
) -> int:
    """Return the batch size of this labeler: the first to ask decides, and it is written down."""
    wanted = config.batch_size
    if wanted == "auto":
        # Every image stands for about 50 copies of itself in activations; the cap keeps batches
        # at a size beyond which neither CPUs nor GPUs gain.
        fits = _IMAGE_BYTES_PER_BATCH // (image_size * image_size * 3 * 50)
        wanted = int(np.clip(fits, 8, 1024 if device.type == "cuda" else 128))
    body = {"schema": 1, "labeler": labeler, "batch_size": wanted}
    there = create_record(store, f"{prediction_folder(labeler)}/resolved.json", body)["batch_size"]
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

    def record_of(shard: Shard) -> dict[str, Any] | None:
        if verify is None:
            return read_record(store, labeler, shard.digest)
        return read_whole_record(store, labeler, shard.digest, verify=verify)

    with ThreadPoolExecutor(16) as pool:
        records = pool.map(record_of, corpus.shards)
        return [s for s, found in zip(corpus.shards, records, strict=True) if found is None]


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
) -> Iterator[int]:
    """Label shards one by one and yield the number of samples of each once it is committed.

    Shards that are recorded already are passed over. With `cut` the top_k form is stored, else the
    full one.

    Raises: TooManyBadSamples, MissingShard, CorruptShard.
    """
    corpus = load_corpus(store, corpus_digest)
    locations = load_locations(store, corpus_digest)
    truth = _Truth(corpus, ensemble.class_names)
    for stem in stems:
        shard = corpus.shard(stem)
        # A group that is tried again goes on where it broke off.
        if read_record(store, labeler, shard.digest) is not None:
            yield shard.num_samples
            continue
        budget = BadSampleBudget(stem, max_bad_samples)
        predicted = predict_samples(
            read_samples(corpus, locations, stem),
            ensemble,
            shard=shard.digest,
            batch_size=batch_size,
            budget=budget,
        )
        bad = {in_shard_key(key, stem): reason for key, reason in sorted(budget.reasons.items())}
        predictions, prob_sums = predicted.to_predictions(
            [truth.of(label) for label in predicted.labels], cut=cut
        )
        calibrated = {} if cut is None else {"temperature": cut.temperature}
        write_predictions(
            store,
            labeler,
            shard.digest,
            predictions,
            {"bad_samples": bad, **calibrated},
            prob_sums=prob_sums,
        )
        yield shard.num_samples


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


def finish(store: Store, specification: Specification, *, seconds: float) -> Manifest:
    """Commit a labelling once every shard of the corpus has its record."""
    labeler = specification.inputs["labeler"]
    corpus = load_corpus(store, specification.inputs["corpus"])
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda s: read_record(store, labeler, s.digest), corpus.shards))
    missing = [s.stem for s, r in zip(corpus.shards, found, strict=True) if r is None]
    if missing:
        raise ValueError(
            f"labelling {specification.fingerprint[:12]}: {len(missing)} of {len(found)} shards"
            f" have no record, first {missing[0]}; run it again to label them"
        )
    records = [r for r in found if r is not None]
    shards = {
        shard.stem: {
            "record_sha256": sha256_hex(canonical_json(record)),
            "num_samples": record["num_samples"],
        }
        for shard, record in zip(corpus.shards, records, strict=True)
    }
    bad = {
        sample_key(shard.stem, key): reason
        for shard, record in zip(corpus.shards, records, strict=True)
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
            "labeled": sum(record["num_samples"] for record in records),
            "bad_samples": bad,
            "shards": shards,
        },
    )
    provenance.record(store, specification.folder, seconds=seconds, device=None)
    return commit_manifest(store, specification.folder, manifest)
