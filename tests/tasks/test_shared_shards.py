"""Shards under another name or in several corpora: labelled once, selected under each name."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from storage.predictions import read_predictions, read_record
from tasks import labeling
from tasks.publishing import PARTS_FOLDER, publish_selection


@pytest.fixture
def labelled_stems(monkeypatch):
    """Stems of the shards whose images the labelling reads, in their order."""
    stems = []

    def read_samples(corpus, locations, stem):
        stems.append(stem)
        return read(corpus, locations, stem)

    read = labeling.read_samples
    monkeypatch.setattr(labeling, "read_samples", read_samples)
    return stems


def selected(lab, labels, folder):
    """Class of every selected sample by its key, as they are published."""
    chosen = lab.select(labels, None, lab.keep_all)
    publish_selection(
        lab.store,
        labels,
        chosen,
        lab.unlabeled,
        str(folder),
        class_names=lab.class_names,
        facts={},
        has_rejected=False,
    )
    table = pq.read_table(folder / PARTS_FOLDER)
    return dict(zip(table["key"].to_pylist(), table["label_id"].to_pylist(), strict=True))


def predicted(lab, teacher, stem):
    """Class of every sample of a shard by its key in the shard, as it is stored."""
    record = read_record(lab.store, lab.labeler(teacher), lab.unlabeled.shard(stem).digest)
    assert record is not None
    found = read_predictions(lab.store, record)
    return dict(zip(found.keys, found.label.tolist(), strict=True))


def with_shards(lab, folder, shards):
    lab.write_split(folder, shards)
    return lab.with_corpora(unlabeled=lab.index_into(lab.store, folder))


def test_a_renamed_shard_keeps_its_predictions_and_is_selected_under_its_new_name(
    pipeline, taught, labelled_stems, tmp_path
):
    teacher = pipeline.teacher.fingerprint
    shards = {
        "kept": taught.images_of("k", 4, start=9000),
        "old": taught.images_of("o", 5, start=9100),
    }
    before = with_shards(taught, tmp_path / "data", shards)
    labels = before.label(teacher)
    assert labelled_stems == ["kept", "old"]

    (tmp_path / "data" / "old.tar").rename(tmp_path / "data" / "new.tar")
    after = taught.with_corpora(unlabeled=taught.index_into(taught.store, tmp_path / "data"))
    assert after.unlabeled.digest != before.unlabeled.digest
    assert after.unlabeled.shard("new").digest == before.unlabeled.shard("old").digest
    labeler = taught.labeler(teacher)
    assert labeling.shards_to_label(taught.store, labeler, after.unlabeled) == []
    labels_after = after.label(teacher)
    assert labelled_stems == ["kept", "old"]

    classes = predicted(before, teacher, "kept"), predicted(before, teacher, "old")
    for lab, manifest, stems in (
        (before, labels, ("kept", "old")),
        (after, labels_after, ("kept", "new")),
    ):
        assert selected(lab, manifest, tmp_path / stems[1]) == {
            f"{stem}/{key}": label
            for stem, of_stem in zip(stems, classes, strict=True)
            for key, label in of_stem.items()
        }


def test_a_shard_of_two_corpora_is_labelled_once_and_selected_from_both(
    pipeline, taught, labelled_stems, tmp_path
):
    teacher = pipeline.teacher.fingerprint
    shared = {"shared": taught.images_of("s", 5, start=9200)}
    first = with_shards(
        taught, tmp_path / "1", shared | {"first": taught.images_of("a", 4, start=9300)}
    )
    second = with_shards(
        taught, tmp_path / "2", shared | {"second": taught.images_of("b", 3, start=9400)}
    )
    digest = first.unlabeled.shard("shared").digest
    labels = first.label(teacher)
    stored = Path(taught.store.url) / "predictions" / taught.labeler(teacher)
    states = {path: path.stat().st_ino for path in stored.glob(f"{digest}*")}
    assert len(states) == 2

    labelled_stems.clear()
    labels_of_second = second.label(teacher)
    assert labelled_stems == ["second"]
    assert {path: path.stat().st_ino for path in stored.glob(f"{digest}*")} == states
    of_shards = [one.counts["shards"] for one in (labels, labels_of_second)]
    assert [set(one) for one in of_shards] == [{"first", "shared"}, {"second", "shared"}]
    assert of_shards[0]["shared"] == of_shards[1]["shared"]

    for own, lab, manifest in (("first", first, labels), ("second", second, labels_of_second)):
        assert selected(lab, manifest, tmp_path / f"out-{own}") == {
            f"{stem}/{key}": label
            for stem in (own, "shared")
            for key, label in predicted(lab, teacher, stem).items()
        }
