"""One image of a run's unlabelled corpus through all rounds: `selftrain explain`."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from itertools import pairwise
from typing import Any

from flows.opening import OpenRun, reopen_run
from flows.run_status import RoundStatus, RunStatus, read_status
from models.architectures import architecture_name
from storage.corpus import Corpus, Shard, load_corpus, load_locations
from storage.manifest import Manifest
from storage.samples import sample_key
from storage.store import Store
from tasks.classifiers import read_description
from tasks.explaining import SampleInRound, explain_round, keys_of_shard, read_image
from tasks.specifications import finished_result, read_result

EXPLANATION_SCHEMA = 1
_MOST_MATCHES = 5
_READ_SPLITS = ("labeled", "dev", "test")


class UnknownSample(ValueError):
    """A key that no round of the run has a prediction for."""


@dataclass(frozen=True)
class Teacher:
    """A model that labelled in a round.

    Attributes:
        fingerprint: of the model.
        round_index: the round that it came from; None where it was given as an extra teacher.
        architecture: its name.
    """

    fingerprint: str
    round_index: int | None
    architecture: str | None


@dataclass(frozen=True)
class ExplainedRound:
    """One round with what made it. Fingerprints are those of the stages."""

    round_index: int
    teachers: tuple[Teacher, ...]
    labeling: Manifest
    selection: Manifest
    sample: SampleInRound

    def to_json(self) -> dict[str, Any]:
        """Return the documented form."""
        sample = self.sample
        judgement = asdict(sample.judgement)
        judgement["target_top"] = list(judgement["target_top"])
        return {
            "round_index": self.round_index,
            "teachers": [asdict(one) for one in self.teachers],
            "predicted": sample.predicted[0].label,
            "confidence": sample.confidence,
            "margin": sample.margin,
            "entropy": sample.entropy,
            "uncertainty": sample.uncertainty,
            "agreement": sample.agreement,
            "top": [asdict(one) for one in sample.predicted],
            "judged": judgement | {"kept": sample.judgement.is_kept},
            "fingerprints": {
                "labeler": self.labeling.inputs["labeler"].fingerprint,
                "labeling": self.labeling.fingerprint,
                "selection": self.selection.fingerprint,
            },
        }


@dataclass(frozen=True)
class Explanation:
    """What a run made of one image.

    Attributes:
        store: URL.
        run: its name.
        key: `<shard stem>/<webdataset key>`.
        corpus: digest of the unlabelled corpus.
        shard: that holds the image.
        url: where the shard lies today.
        rounds: those whose selection is finished, at least one.
        unfinished_rounds: indices of rounds that have begun to label or select.
    """

    store: str
    run: str
    key: str
    corpus: str
    shard: Shard
    url: str
    rounds: tuple[ExplainedRound, ...]
    unfinished_rounds: tuple[int, ...]

    @property
    def truth(self) -> str | None:
        """The true class where the corpus has it; for diagnosis, nothing in the run reads it."""
        return self.rounds[-1].sample.truth

    @property
    def num_flips(self) -> int:
        """In how many rounds the class was another than in the round before."""
        labels = [one.sample.judgement.label for one in self.rounds]
        return sum(before != after for before, after in pairwise(labels))

    def to_json(self) -> dict[str, Any]:
        """Return the documented form, schema 1."""
        return {
            "schema": EXPLANATION_SCHEMA,
            "store": self.store,
            "run": self.run,
            "key": self.key,
            "corpus": self.corpus,
            "shard": {
                "stem": self.shard.stem,
                "digest": self.shard.digest,
                "samples": self.shard.num_samples,
                "url": self.url,
            },
            "truth": {"label": self.truth, "use": "diagnosis only"},
            "label_flips": self.num_flips,
            "rounds": [one.to_json() for one in self.rounds],
            "unfinished_rounds": list(self.unfinished_rounds),
        }


def explain_sample(store: Store, run_name: str, key: str) -> Explanation:
    """Follow one image of the unlabelled corpus through the rounds of a run.

    Raises: UnknownRun; UnknownSample, with near matches, if the key is not of the unlabelled
        corpus, was excluded or could not be decoded; ValueError while no round has selected.
    """
    run = reopen_run(store, run_name)
    if run.pins.unlabeled is None:
        raise ValueError(
            f"run {run_name!r} has no unlabelled corpus (rounds: 0): nothing to explain"
        )
    corpus = load_corpus(store, run.pins.unlabeled)
    shard, in_shard = _locate(run, corpus, key)
    status = read_status(store, run_name)
    stages, unfinished = _finished_rounds(store, status)
    if not stages:
        raise ValueError(_why_nothing_is_selected(status, unfinished))
    rounds: list[ExplainedRound] = []
    for one, labeling, selection in stages:
        sample = explain_round(
            store,
            shard,
            in_shard,
            labeling=labeling,
            selection=selection,
            class_names=run.pins.class_names,
        )
        if sample is None:
            raise UnknownSample(_why_unpredicted(run, shard, in_shard, labeling))
        teachers = _teachers_of(run, status, one.round_index)
        rounds.append(ExplainedRound(one.round_index, teachers, labeling, selection, sample))
    return Explanation(
        store=store.url,
        run=run_name,
        key=key,
        corpus=corpus.digest,
        shard=shard,
        url=load_locations(store, corpus.digest)[shard.stem],
        rounds=tuple(rounds),
        unfinished_rounds=unfinished,
    )


def read_explained_image(store: Store, explanation: Explanation) -> bytes:
    """Return the file of the image that is explained, out of its shard."""
    stem = explanation.shard.stem
    corpus = load_corpus(store, explanation.corpus)
    return read_image(store, corpus, stem, explanation.key[len(stem) + 1 :])


def _locate(run: OpenRun, corpus: Corpus, key: str) -> tuple[Shard, str]:
    """Return the shard of a key and the key in it; raises UnknownSample."""
    stem, slash, in_shard = key.partition("/")
    shards = {shard.stem: shard for shard in corpus.shards}
    if not (stem and slash and in_shard):
        raise UnknownSample(
            f"{key!r} is no sample key: it is <shard stem>/<webdataset key>, such as"
            f" {corpus.shards[0].stem}/000123{_nearest(stem, shards)}"
        )
    if stem not in shards:
        others = [name for name in _READ_SPLITS if _has_shard(run, name, stem)]
        if others:
            raise UnknownSample(
                f"{key!r}: shard {stem!r} is of data.{others[0]}. Only images of the unlabelled"
                " corpus are labelled and selected; those of labeled are trained on as they are,"
                " those of dev and test only judge"
            )
        raise UnknownSample(
            f"{key!r}: the unlabelled corpus of run {run.name!r} has no shard {stem!r}; it has"
            f" {len(shards)}, from {corpus.shards[0].stem!r} to {corpus.shards[-1].stem!r}"
            f"{_nearest(stem, shards)}"
        )
    shard = shards[stem]
    if in_shard in shard.excluded:
        raise UnknownSample(
            f"{key!r} is excluded: data.exclude named it when run {run.name!r} was opened, so no"
            " stage has read it"
        )
    return shard, in_shard


def _has_shard(run: OpenRun, split: str, stem: str) -> bool:
    digest = getattr(run.pins, split)
    if digest is None:
        return False
    return any(shard.stem == stem for shard in load_corpus(run.store, digest).shards)


def _why_unpredicted(run: OpenRun, shard: Shard, in_shard: str, labeling: Manifest) -> str:
    key = sample_key(shard.stem, in_shard)
    bad: Mapping[str, str] = labeling.counts["bad_samples"]
    if key in bad:
        return (
            f"{key!r} could not be decoded and was skipped, within max_bad_samples: {bad[key]}."
            " It is in no labelling and no selection"
        )
    keys = keys_of_shard(run.store, labeling, shard)
    text = (
        f"{key!r}: shard {shard.stem} ({shard.digest[:12]}) is of the unlabelled corpus and has"
        f" {shard.num_samples} samples, but none of this key"
        f"{_nearest(in_shard, keys, prefix=f'{shard.stem}/')}"
    )
    others = [name for name in _READ_SPLITS if _has_shard(run, name, shard.stem)]
    if others:
        text += f"; data.{others[0]} has a shard of this stem, too, whose images are never labelled"
    return text


def _finished_rounds(
    store: Store, status: RunStatus
) -> tuple[list[tuple[RoundStatus, Manifest, Manifest]], tuple[int, ...]]:
    """Return the rounds with a finished selection, and the indices of those that lack it."""
    finished: list[tuple[RoundStatus, Manifest, Manifest]] = []
    unfinished: list[int] = []
    for one in status.rounds:
        begun = [stage for stage in one.stages if stage["kind"] in ("label", "select")]
        if not begun:
            continue
        selections = [
            read_result(store, "select", stage["fingerprint"])
            for stage in begun
            if stage["kind"] == "select"
        ]
        if not selections or selections[0] is None:
            unfinished.append(one.round_index)
            continue
        # A round may have labelled dev as well: the selection says which labelling it is of.
        labeling = selections[0].inputs["labeling"].fingerprint
        finished.append((one, finished_result(store, "label", labeling), selections[0]))
    return finished, tuple(unfinished)


def _why_nothing_is_selected(status: RunStatus, unfinished: tuple[int, ...]) -> str:
    run = status.run
    if not unfinished and any(one.round_index > 0 for one in status.rounds):
        return (
            f"run {run!r} stores no pseudo-labels: its students label while they train"
            " (objective.kind fixmatch or distillation), so there is nothing to explain"
        )
    return f"run {run!r} has finished no selection yet: `selftrain resume {run}` goes on"


def _teachers_of(run: OpenRun, status: RunStatus, round_index: int) -> tuple[Teacher, ...]:
    """Return the models that label in a round, its teacher first: `RunGraph.teachers`, named.

    The loop goes on from promoted students only.
    """
    before = [one for one in status.rounds if one.round_index < round_index]
    promoted = [one for one in before if one.promoted or one.round_index == 0]
    found: dict[str, Teacher] = {}
    for one in promoted[::-1][: 1 + run.config.extra_teachers.earlier_rounds]:
        assert one.fingerprint is not None, "a teacher is finished before it labels"
        found[one.fingerprint] = Teacher(one.fingerprint, one.round_index, one.architecture)
    for model in run.pins.extra_teachers:
        architecture = architecture_name(read_description(run.store, model).architecture)
        found.setdefault(model, Teacher(model, None, architecture))
    return tuple(found.values())


def _nearest(wanted: str, known: Iterable[str], *, prefix: str = "") -> str:
    """Return the known names that are most like a wanted one, as the end of a message."""
    found = get_close_matches(wanted, list(known), n=_MOST_MATCHES, cutoff=0.5)
    return f"; nearest: {', '.join(prefix + name for name in found)}" if found else ""
