"""What a user has, images in folders or shards: found, indexed and looked at."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from flows.corpora import index_corpus
from flows.first_shards import HELD_OUT_FRACTION, Hints, Located, is_images, shard_images
from flows.loading import ConfigError
from storage import objects
from storage.corpus import Corpus, load_locations
from storage.indexing import sorted_by_class
from storage.patterns import below_root
from storage.store import Store
from tasks.image_sizes import MAX_LOOKED_AT, ImageSizes, files_of, look_at
from tasks.sharding import SPLITS

_MAX_IMBALANCE = 10


@dataclass(frozen=True)
class FirstLook:
    """The corpora of a run to be.

    Attributes:
        root: put before the patterns; empty: nothing.
        patterns: split (labeled, dev, unlabeled and maybe test) -> what to write into the config.
        corpora: split -> what it holds.
        sizes: of some images of all splits but test.
        made_by: how the shards were made of images; None if they were there.
        warnings: what the user should know.
    """

    root: str
    patterns: Mapping[str, str]
    corpora: Mapping[str, Corpus]
    sizes: ImageSizes
    made_by: str | None
    warnings: tuple[str, ...]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the labelled corpus."""
        names = self.corpora["labeled"].class_names
        assert names is not None, "checked when the labelled corpus was indexed"
        return names

    @property
    def label_counts(self) -> dict[str, int]:
        """Class name -> labelled images that a teacher trains on."""
        counts = self.corpora["labeled"].label_counts()
        return {name: counts.get(number, 0) for number, name in enumerate(self.class_names)}

    @property
    def imbalance(self) -> float | None:
        """Labels of the largest class over those of the smallest; None if one has none."""
        counts = self.label_counts.values()
        return max(counts) / min(counts) if min(counts) else None


def look_at_data(store: Store, source: str, hints: Hints, *, shards: str) -> FirstLook:
    """Find the corpora of a run, making shards of images, and index them into the store.

    Args:
        store: keeps corpora and index, so that `plan` and `run` read nothing again.
        source: a folder of images (CLASS/image.jpg, and unlabelled ones directly in it, or
            train/ and unlabeled/ above), a table, an archive; or shards by folder, pattern, list
            or index.
        hints: what the user says beside.
        shards: folder or URL for shards that are made, and for lists of shards.
    Raises: ConfigError for what cannot become a run, with what to do; ValueError and OSError of
        reading and writing data.
    """
    for named in (source, hints.labels):
        if named is not None and "://" not in named and not _is_pattern(named):
            _refuse_missing(named)
    if is_images(source):
        located = shard_images(source, hints, shards)
    else:
        located = _locate_shards(store, source, hints, shards)
    corpora = {
        split: index_corpus(store, pattern, named=f"data.{split}", root=located.root)
        for split, pattern in located.patterns.items()
    }
    if corpora["labeled"].class_names is None:
        raise ConfigError(
            f"{located.patterns['labeled']}: no classes.json beside the labelled shards, so class"
            ' numbers have no names. Write {"schema": 1, "class_names": [...]} there'
        )
    looked_at = [corpora[split] for split in corpora if split != "test"]
    share = MAX_LOOKED_AT // len(looked_at)
    sizes = look_at(
        file
        for corpus in looked_at
        for file in files_of(corpus, load_locations(store, corpus.digest), size=share)
    )
    found = FirstLook(located.root, located.patterns, corpora, sizes, located.made_by, ())
    return replace(found, warnings=tuple(_warnings(found)))


def _warnings(found: FirstLook) -> list[str]:
    warnings: list[str] = []
    for split, corpus in found.corpora.items():
        message = sorted_by_class(corpus.shards)
        if message is not None:
            warnings.append(f"data.{split}: {message}")
    counts, imbalance = found.label_counts, found.imbalance
    missing = [name for name, count in counts.items() if count == 0]
    if missing:
        warnings.append(f"no label of {', '.join(missing[:10])}: a run will be refused")
    elif imbalance is not None and imbalance > _MAX_IMBALANCE:
        largest, smallest = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
        warnings.append(
            f"labels are imbalanced {imbalance:.0f} to 1: {counts[largest]:,} of {largest},"
            f" {counts[smallest]:,} of {smallest}. Look at the accuracy of each class in the report"
        )
    num_dev = found.corpora["dev"].num_samples
    if num_dev < 200:
        warnings.append(
            f"the dev split has {num_dev} images: an accuracy of 80 % is known to"
            f" +- {100 * 1.96 * (0.16 / num_dev) ** 0.5:.0f} points. Label more if you can"
        )
    if "test" not in found.corpora:
        warnings.append("there is no test split: accuracies on dev, which steers the run, are all")
    if found.sizes.unreadable:
        warnings.append(
            f"{found.sizes.unreadable} of {found.sizes.looked_at} images that were looked at cannot"
            " be read"
        )
    return warnings


def _locate_shards(store: Store, source: str, hints: Hints, shards: str) -> Located:
    """Return where the splits lie of a user who has shards."""
    if hints.labels_per_class is not None:
        raise ConfigError(
            "--labels-per-class holds labels back when shards are made of images, and"
            f" {source} holds shards already: leave it out"
        )
    names = [] if hints.labels is not None or _is_pattern(source) else objects.list_folders(source)
    if {"labeled", "dev", "unlabeled"} <= set(names):
        with_test = "test" in names and bool(objects.list_objects(f"{source.rstrip('/')}/test"))
        splits = [split for split in SPLITS if split != "test" or with_test]
        splits = [s for s in splits if s not in ("dev", "test") or getattr(hints, s) is None]
        patterns = {split: split for split in splits}
        return Located(source.rstrip("/"), patterns | _given(hints))
    if hints.labels is None:
        raise ConfigError(
            f"{source}: shards without the folders labeled/, dev/ and unlabeled/ that `selftrain"
            " data shard` makes. Say which images have labels: --labels SHARDS or a folder with a"
            " folder for each class; the others are then the corpus to label"
        )
    if is_images(hints.labels):
        located = shard_images(hints.labels, Hints(), shards, unlabeled=source)
        patterns = {k: below_root(v, located.root) for k, v in located.patterns.items()}
        return Located("", patterns | _given(hints) | {"unlabeled": source}, located.made_by)
    patterns = _given(hints) | {"unlabeled": source}
    if hints.dev is None:
        patterns = _split_by_shard(store, hints.labels, shards) | patterns
    return Located("", {"labeled": hints.labels} | patterns)


def _is_pattern(source: str) -> bool:
    return source.endswith((".json", ".txt", ".tar")) or any(c in source for c in "{*?[,")


def _refuse_missing(path: str) -> None:
    if not os.path.exists(os.path.expanduser(path)):
        raise ConfigError(f"{path}: there is no such file or folder")


def _given(hints: Hints) -> dict[str, str]:
    given = {"dev": hints.dev, "test": hints.test}
    return {split: pattern for split, pattern in given.items() if pattern is not None}


def _split_by_shard(store: Store, labels: str, shards: str) -> dict[str, str]:
    """Take every fifth labelled shard, one at least, for dev; return the two lists' addresses."""
    corpus = index_corpus(store, labels, named="--labels")
    remedy = (
        "Name the dev split with --dev, or give the labelled images as folders of classes, so that"
        " it can be drawn from them"
    )
    if len(corpus.shards) < 2 or sorted_by_class(corpus.shards) is not None:
        raise ConfigError(
            f"--labels {labels}: {len(corpus.shards)} shards, from which no dev split can be taken"
            f" shard by shard (it takes two or more, each with all classes). {remedy}"
        )
    step = round(1 / HELD_OUT_FRACTION)
    held_out = set(corpus.shards[::step])
    kept = [shard for shard in corpus.shards if shard not in held_out]
    classes = [{n for s in part for n in s.label_counts or {}} for part in (corpus.shards, kept)]
    if classes[0] != classes[1]:
        raise ConfigError(
            f"--labels {labels}: some classes are in every fifth shard only. {remedy}"
        )
    locations = load_locations(store, corpus.digest)
    lists: dict[str, str] = {}
    for split, part in (("labeled", kept), ("dev", sorted(held_out, key=lambda s: s.stem))):
        lists[split] = objects.join_url(shards, f"{split}.txt")
        text = "".join(f"{locations[shard.stem]}\n" for shard in part)
        objects.write_object(lists[split], text.encode(), "replace")
    return lists
