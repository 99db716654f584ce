"""Labelling: the same bytes twice, joined with truth by name, shared by every corpus."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.aggregation import (
    McDropoutConfig,
    TeachersUncertaintyConfig,
    ViewsUncertaintyConfig,
)
from models.calibration import apply_temperature
from models.exact_sums import exact_mean
from models.randomness import derive_seed
from models.training import initial_state
from models.views import HflipViewConfig, KRandomViewConfig
from storage.corpus import MissingShard
from storage.predictions import probability_sums, read_predictions, read_record
from storage.samples import CorruptShard
from tasks import labeling
from tasks.classifiers import ClassesMismatch, StoredClassifier
from tasks.ensembles import Ensemble, load_ensemble
from tasks.labeling import labeler_fingerprint, resolve_batch_size
from tasks.labeling_config import LabelingConfig
from tasks.predicting import Cut
from tasks.shard_items import TooManyBadSamples

VIEW = {"image_size": 8, "crop_padding": 0, "interpolation": "bilinear"}
CPU = torch.device("cpu")


def files_of(store, folder):
    root = Path(store.url) / folder
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


def predictions_by_stem(lab, labeler):
    found = {}
    for shard in lab.unlabeled.shards:
        record = read_record(lab.store, labeler, shard.digest)
        assert record is not None
        found[shard.stem] = read_predictions(lab.store, record)
    return found


@pytest.fixture
def copied(pipeline, lab):
    """This test's store with the pipeline's teacher in it."""
    source = Path(pipeline.lab.store.url) / "models" / pipeline.teacher.fingerprint
    target = Path(lab.store.url) / "models" / pipeline.teacher.fingerprint
    for path in source.rglob("*"):
        if path.is_file():
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            (target / path.relative_to(source)).write_bytes(path.read_bytes())
    return lab


def test_labelling_twice_gives_identical_bytes(pipeline, copied):
    teacher = pipeline.teacher.fingerprint
    again = copied.label(teacher)
    assert again.fingerprint == pipeline.labels.fingerprint
    assert again.sha256 == pipeline.labels.sha256
    folder = f"predictions/{copied.labeler(teacher)}"
    first, second = files_of(pipeline.lab.store, folder), files_of(copied.store, folder)
    assert len(first) == 10  # 5 shards, each with its Parquet and its record
    assert first == second


def test_order_and_grouping_of_shards_change_no_byte(pipeline, copied):
    teacher = pipeline.teacher.fingerprint
    stems = [shard.stem for shard in copied.unlabeled.shards]
    for group in (stems[3:], stems[:1], stems[1:3][::-1]):
        list(
            labeling.label_shards(
                copied.store,
                copied.unlabeled.digest,
                group,
                Ensemble((copied.classifier(teacher),)),
                labeler=copied.labeler(teacher),
                batch_size=16,
                max_bad_samples=0,
            )
        )
    folder = f"predictions/{copied.labeler(teacher)}"
    assert files_of(copied.store, folder) == files_of(pipeline.lab.store, folder)


def test_order_of_shards_changes_no_byte_of_random_views_and_dropout(pipeline, lab):
    config = LabelingConfig(view=KRandomViewConfig(k=2), uncertainty=McDropoutConfig(passes=3))
    ensemble = load_ensemble(
        pipeline.lab.store,
        [pipeline.teacher.fingerprint],
        config,
        device=CPU,
        class_names=lab.class_names,
    )
    stems = [shard.stem for shard in lab.unlabeled.shards]
    for labeler, groups in (("1" * 64, [stems]), ("2" * 64, [stems[3:], stems[:3][::-1]])):
        for group in groups:
            list(
                labeling.label_shards(
                    lab.store,
                    lab.unlabeled.digest,
                    group,
                    ensemble,
                    labeler=labeler,
                    batch_size=4,
                    max_bad_samples=0,
                )
            )
    first, second = (
        {
            name: sha
            for name, sha in files_of(lab.store, f"predictions/{labeler}").items()
            if name.endswith(".parquet")
        }
        for labeler in ("1" * 64, "2" * 64)
    )
    assert len(first) == 5
    assert sorted(first.values()) == sorted(second.values())
    stored = predictions_by_stem(lab, "1" * 64)[stems[0]]
    assert stored.optional == ("uncertainty", "agreement")
    assert (stored.uncertainty > 0).all()


def test_predictions_hold_in_shard_keys_and_truth_where_it_is_known(pipeline):
    found = predictions_by_stem(pipeline.lab, pipeline.lab.labeler(pipeline.teacher.fingerprint))
    assert found["unlabeled-0"].keys == tuple(f"u{i:03d}" for i in range(10))
    assert found["unlabeled-0"].true_label.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    # Shard 2 has u020..u024 with truth and v000..v004 without.
    assert found["unlabeled-2"].true_label.tolist() == [2, 0, 1, 2, 0, -1, -1, -1, -1, -1]
    assert found["unlabeled-4"].true_label.tolist() == [-1] * 10


def test_the_manifest_counts_shards_samples_and_names_their_records(pipeline):
    counts = pipeline.labels.counts
    assert counts["samples"] == counts["labeled"] == 50
    assert counts["bad_samples"] == {}
    assert {stem: s["num_samples"] for stem, s in counts["shards"].items()} == {
        f"unlabeled-{i}": 10 for i in range(5)
    }
    assert pipeline.labels.objects == ()
    assert pipeline.labels.inputs["corpus"].fingerprint == pipeline.lab.unlabeled.digest


def label_one(lab, stem, classifier, *, labeler="1" * 64, cut=None):
    """Label one shard and return what is stored of it."""
    done = labeling.label_shards(
        lab.store,
        lab.unlabeled.digest,
        [stem],
        Ensemble((classifier,)),
        labeler=labeler,
        batch_size=16,
        max_bad_samples=0,
        cut=cut,
    )
    assert list(done) == [lab.unlabeled.shard(stem).num_samples]
    record = read_record(lab.store, labeler, lab.unlabeled.shard(stem).digest)
    assert record is not None
    return read_predictions(lab.store, record)


class _ByBrightness(torch.nn.Module):
    """Class = the brightest channel, in the order given by `channels`."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels

    def forward(self, images):
        return 20 * images.mean(dim=(2, 3))[:, self.channels]


def test_truth_is_joined_by_name_when_the_model_has_another_class_order(pipeline, lab):
    # The run's order is blue, red, green; .cls numbers mean red, green, blue.
    names = ("blue", "red", "green")
    description = pipeline.lab.classifier(pipeline.teacher.fingerprint).description
    classifier = StoredClassifier("0" * 64, _ByBrightness([2, 0, 1]), description, names, CPU)
    found = label_one(lab, "unlabeled-0", classifier)
    # Images are red, green, blue, red, ...: in the run's order 1, 2, 0, 1, ...
    assert found.true_label.tolist() == [1, 2, 0, 1, 2, 0, 1, 2, 0, 1]
    is_easy = np.arange(10) % 5 < 3  # hardness 0 to 0.4
    assert (found.label == found.true_label)[is_easy].all()


def test_a_stored_model_labels_in_the_runs_order(pipeline, lab):
    own = pipeline.lab.classifier(pipeline.teacher.fingerprint)
    other = pipeline.lab.classifier(pipeline.teacher.fingerprint, ["blue", "red", "green"])
    first = label_one(lab, "unlabeled-0", own, labeler="1" * 64)
    second = label_one(lab, "unlabeled-0", other, labeler="2" * 64)
    # Class 0 (red) of the model is class 1 of the other run, green 2, blue 0.
    assert second.label.tolist() == [[1, 2, 0][label] for label in first.label]
    assert second.true_label.tolist() == [[1, 2, 0][label] for label in first.true_label]
    np.testing.assert_array_equal(second.log_probs[:, [1, 2, 0]], first.log_probs)
    # Sums over the classes run in another order: the last bit may differ.
    np.testing.assert_allclose(second.confidence, first.confidence, rtol=3e-7)


def test_a_label_number_without_a_name_is_unknown_truth(pipeline, lab, tmp_path):
    folder = lab.write_split(tmp_path / "x", {"x-0": [("a", lab.png(0, 1), 7)]}, class_names=None)
    chosen = lab.with_corpora(unlabeled=lab.index_into(lab.store, folder))
    classifier = pipeline.lab.classifier(pipeline.teacher.fingerprint)
    assert label_one(chosen, "x-0", classifier).true_label.tolist() == [-1]


def test_a_model_of_other_classes_cannot_label(pipeline):
    with pytest.raises(ClassesMismatch, match="only in the corpus: violet"):
        pipeline.lab.classifier(pipeline.teacher.fingerprint, ["red", "green", "violet"])


def test_undecodable_images_are_listed_with_their_keys(pipeline, copied, tmp_path):
    samples = [
        *copied.images_of("u", 4, start=0, labeled=False),
        ("u004", b"\xff\xd8\xff cut", None),
    ]
    folder = copied.write_split(tmp_path / "x", {"x-0": samples})
    broken = copied.with_corpora(unlabeled=copied.index_into(copied.store, folder))
    with pytest.raises(TooManyBadSamples, match=r"shard x-0: 1 undecodable .*x-0/u004"):
        broken.label(pipeline.teacher.fingerprint)
    manifest = broken.label(pipeline.teacher.fingerprint, max_bad_samples=1)
    assert list(manifest.counts["bad_samples"]) == ["x-0/u004"]
    assert manifest.counts["samples"] == 5
    assert manifest.counts["labeled"] == 4
    assert manifest.counts["shards"]["x-0"]["num_samples"] == 4


def test_an_unfinished_labelling_names_the_first_missing_shard(pipeline, copied):
    with pytest.raises(ValueError, match="3 of 5 shards have no record, first unlabeled-1; run it"):
        copied.label(pipeline.teacher.fingerprint, stems=["unlabeled-0", "unlabeled-3"])


def test_shards_that_are_done_are_not_labelled_again(pipeline, copied):
    teacher = pipeline.teacher.fingerprint
    labeler = copied.labeler(teacher)
    with pytest.raises(ValueError, match="have no record"):
        copied.label(teacher, stems=["unlabeled-0", "unlabeled-3"])
    missing = labeling.shards_to_label(copied.store, labeler, copied.unlabeled)
    assert [shard.stem for shard in missing] == ["unlabeled-1", "unlabeled-2", "unlabeled-4"]
    # A task that is retried passes over what it had finished.
    classifier = StoredClassifier(
        teacher,
        _Explodes(),
        copied.classifier(teacher).description,
        copied.class_names,
        CPU,
    )
    done = labeling.label_shards(
        copied.store,
        copied.unlabeled.digest,
        ["unlabeled-0", "unlabeled-3"],
        Ensemble((classifier,)),
        labeler=labeler,
        batch_size=16,
        max_bad_samples=0,
    )
    assert list(done) == [10, 10]


class _Explodes(torch.nn.Module):
    def forward(self, images):
        raise AssertionError("a finished shard is predicted again")


def test_a_corpus_that_grew_costs_its_new_shards_only(pipeline, copied, tmp_path):
    teacher = pipeline.teacher.fingerprint
    copied.label(teacher)
    folder = tmp_path / "grown"
    folder.mkdir()
    for path in (copied.folder / "unlabeled").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    copied.write_shard(folder / "more-0.tar", copied.images_of("m", 4, start=9000))
    grown = copied.with_corpora(unlabeled=copied.index_into(copied.store, folder))
    labeler = copied.labeler(teacher)
    missing = labeling.shards_to_label(copied.store, labeler, grown.unlabeled)
    assert [shard.stem for shard in missing] == ["more-0"]
    manifest = grown.label(teacher, stems=["more-0"])
    assert manifest.counts["samples"] == 54
    assert manifest.fingerprint != pipeline.labels.fingerprint


def test_a_missing_shard_and_a_changed_one_name_shard_place_and_remedy(pipeline, copied, tmp_path):
    folder = tmp_path / "own"
    copied.write_split(folder, {"own-0": copied.images_of("o", 4, start=9100)})
    chosen = copied.with_corpora(unlabeled=copied.index_into(copied.store, folder))
    shard = folder / "own-0.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(CorruptShard, match=f"shard own-0 at {shard} is not what was indexed"):
        chosen.label(pipeline.teacher.fingerprint)
    shard.unlink()
    with pytest.raises(MissingShard, match=rf"own-0: nothing at {shard}\. Put the shard back"):
        chosen.label(pipeline.teacher.fingerprint)


def test_an_empty_shard_is_labelled_with_no_rows(pipeline, copied, tmp_path):
    folder = copied.write_split(
        tmp_path / "x", {"x-0": copied.images_of("o", 4, start=9100), "x-1": []}
    )
    chosen = copied.with_corpora(unlabeled=copied.index_into(copied.store, folder))
    manifest = chosen.label(pipeline.teacher.fingerprint)
    assert {stem: s["num_samples"] for stem, s in manifest.counts["shards"].items()} == {
        "x-0": 4,
        "x-1": 0,
    }


def test_a_broken_model_stops_the_labelling(pipeline, lab, tmp_path):
    description = pipeline.lab.classifier(pipeline.teacher.fingerprint).description
    state = initial_state(lab.config(), 3, seed=derive_seed(0), device=CPU)
    network = state.model
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(float("nan"))
    classifier = StoredClassifier("0" * 64, network, description, lab.class_names, CPU)
    with pytest.raises(ValueError, match="not finite"):
        label_one(lab, "unlabeled-0", classifier)
    assert read_record(lab.store, "1" * 64, lab.unlabeled.shards[0].digest) is None


BASE: dict[str, Any] = {"teacher": "a" * 64, "view": VIEW, "class_names": ["x", "y"]}


def based(**changes: Any) -> dict[str, Any]:
    return BASE | changes


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (LabelingConfig(precision="bf16"), {}),
        (LabelingConfig(view=HflipViewConfig()), {}),
        (LabelingConfig(uncertainty=McDropoutConfig()), {}),
        (LabelingConfig(), {"more_teachers": {"b" * 64: VIEW}}),
        (LabelingConfig(), {"teacher": "b" * 64}),
        (LabelingConfig(), {"view": VIEW | {"interpolation": "bicubic"}}),
        (LabelingConfig(), {"view": VIEW | {"crop_padding": 4}}),
        (LabelingConfig(), {"class_names": ["y", "x"]}),
    ],
)
def test_what_changes_a_prediction_changes_its_address(config, changes):
    assert labeler_fingerprint(config, **BASE | changes) != labeler_fingerprint(
        LabelingConfig(), **BASE
    )


def test_how_views_are_drawn_and_averaged_changes_the_address():
    drawn = [KRandomViewConfig(k=2), KRandomViewConfig(k=2, seed=1), KRandomViewConfig(k=3)]
    addresses = {
        labeler_fingerprint(LabelingConfig(view=view, aggregate=how), **BASE)
        for view in drawn
        for how in ("mean_prob", "mean_logit")
    }
    assert len(addresses) == 6


def test_the_order_of_teachers_changes_no_address():
    other = {"image_size": 16, "crop_padding": 0, "interpolation": "bilinear"}
    one = labeler_fingerprint(LabelingConfig(), **BASE, more_teachers={"b" * 64: other})
    swapped = based(teacher="b" * 64, view=other)
    assert labeler_fingerprint(LabelingConfig(), **swapped, more_teachers={"a" * 64: VIEW}) == one
    # Which teacher sees what is part of it.
    wrong = based(teacher="b" * 64)
    assert labeler_fingerprint(LabelingConfig(), **wrong, more_teachers={"a" * 64: other}) != one


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LabelingConfig(aggregate="mean_logit"), "nothing to aggregate"),
        (LabelingConfig(uncertainty=ViewsUncertaintyConfig()), "several views, or mc_dropout"),
        (LabelingConfig(uncertainty=TeachersUncertaintyConfig()), "take several teachers"),
    ],
)
def test_settings_that_cannot_take_effect_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        labeler_fingerprint(config, **BASE)


VALIDATION = "c" * 64
MANY = [f"c{i}" for i in range(257)]


def test_auto_is_full_up_to_256_classes_and_keeps_its_address():
    few = based(class_names=MANY[:256])
    full = labeler_fingerprint(LabelingConfig(form="full"), **few)
    assert labeler_fingerprint(LabelingConfig(form="auto"), **few) == full
    # Neither k nor the validation is part of the full form.
    assert labeler_fingerprint(LabelingConfig(k=3), **few, validation=VALIDATION) == full


def test_auto_is_top_k_above_256_classes():
    many = based(class_names=MANY, validation=VALIDATION)
    top_k = labeler_fingerprint(LabelingConfig(form="top_k"), **many)
    assert labeler_fingerprint(LabelingConfig(), **many) == top_k
    assert labeler_fingerprint(LabelingConfig(form="full"), **many) != top_k
    assert labeler_fingerprint(LabelingConfig(k=11), **many) != top_k
    assert (
        labeler_fingerprint(LabelingConfig(), **based(class_names=MANY, validation="d" * 64))
        != top_k
    )


def test_top_k_without_a_validation_or_enough_classes_is_refused():
    with pytest.raises(ValueError, match="no validation of the model is given"):
        labeler_fingerprint(LabelingConfig(), **based(class_names=MANY))
    with pytest.raises(ValueError, match=r"k=10 with labeling\.form=top_k: there are 2 classes"):
        labeler_fingerprint(LabelingConfig(form="top_k"), **BASE, validation=VALIDATION)


def test_top_k_labels_are_the_calibrated_whole_predictions_cut(pipeline, lab):
    classifier = pipeline.lab.classifier(pipeline.teacher.fingerprint)
    whole = label_one(lab, "unlabeled-0", classifier, labeler="1" * 64)
    cut = label_one(lab, "unlabeled-0", classifier, labeler="2" * 64, cut=Cut(2, 1.5))
    calibrated = np.exp(apply_temperature(whole.log_probs, 1.5))
    order = np.argsort(-calibrated, axis=1)
    assert cut.form == "top_k"
    assert cut.listed is not None
    assert cut.label.tolist() == whole.label.tolist()
    np.testing.assert_allclose(cut.confidence, calibrated.max(axis=1), rtol=2e-3)
    np.testing.assert_array_equal(cut.listed.class_ids, order[:, :2])
    np.testing.assert_allclose(cut.listed.rest_mass, calibrated.min(axis=1), rtol=5e-3)
    np.testing.assert_array_equal(cut.logsumexp, whole.logsumexp)
    record = read_record(lab.store, "2" * 64, lab.unlabeled.shard("unlabeled-0").digest)
    assert record is not None
    assert record["facts"]["temperature"] == 1.5
    sums = probability_sums(record)
    assert sums is not None
    mean = exact_mean(sums, cut.num_samples)
    np.testing.assert_allclose(mean, calibrated.mean(axis=0), rtol=2e-3)


def test_how_the_work_is_cut_does_not_change_the_address():
    config = LabelingConfig(batch_size=64, shards_per_task=3, verify="size")
    assert labeler_fingerprint(config, **BASE) == labeler_fingerprint(LabelingConfig(), **BASE)


def test_the_first_batch_size_of_a_labeler_holds_for_all_later_ones(lab, caplog):
    config = LabelingConfig(batch_size="auto")
    labeler = "c" * 64

    def resolve(config, labeler=labeler, width=2**20):  # of 4 MiB an image, 16 are 64 MiB
        return resolve_batch_size(
            lab.store, labeler, config, device=CPU, predict=lambda n: torch.zeros(n, width)
        )

    assert resolve(config) == 16
    assert resolve(LabelingConfig(batch_size=16)) == 16
    assert resolve(config, width=2**10) == 16
    assert caplog.text == ""
    assert resolve(LabelingConfig(batch_size=7)) == 16
    assert "labeling.batch_size=7 has no effect: labeler cccccccccccc began with 16" in caplog.text
    assert resolve(config, "d" * 64, width=2**10) == 128
    assert resolve(config, "e" * 64, width=2**24) == 8
