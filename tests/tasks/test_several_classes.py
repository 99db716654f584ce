"""An image as a pseudo-label of several of its most probable classes: from rows to the loss."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from models.balancing import TopKConfig
from models.objectives.cross_entropy import soft_cross_entropy
from models.thresholds import FixedThresholdConfig
from models.top_k_probs import cut_to_top_k
from storage.corpus import Corpus, Shard, save_corpus
from storage.manifest import Manifest, read_stored
from storage.predictions import Listed, write_predictions
from storage.selections import Reason, Selection, from_parquet
from tasks import labeling
from tasks.explaining import explain_round
from tasks.selection import SelectionConfig, read_summary

# Ranked under their two most probable classes, of which each takes two:
# class 0: c .7, a .6, b .5 -> c, a; class 1: d .35, a .3, c .2 -> d, a; class 2: d .55, b .4 -> all
PROBS = {"a": (0.6, 0.3, 0.1), "b": (0.5, 0.1, 0.4), "c": (0.7, 0.2, 0.1), "d": (0.1, 0.35, 0.55)}
SHARDS = (("s", "ab"), ("t", "cd"))


def rules(**changes: Any) -> SelectionConfig:
    settings: dict[str, Any] = {
        "threshold": FixedThresholdConfig(confidence=0),
        "calibration": "none",
        "balance": TopKConfig(k=2, upsample=False, classes_per_image=2),
        "target": "hard",
        "allow_collapse": True,
    }
    return SelectionConfig(**settings | changes)


def plant(lab: Any, *, k: int | None = None) -> Manifest:
    """A finished labelling of two shards, in the full form or cut to k classes."""
    shards = [Shard(stem, f"{i}" * 64, len(keys), 9) for i, (stem, keys) in enumerate(SHARDS)]
    corpus = Corpus.of(shards, lab.class_names)
    save_corpus(lab.store, corpus, {stem: f"/nowhere/{stem}.tar" for stem, _ in SHARDS})
    labeler = ("f" if k is None else "e") * 64
    for shard, (_, keys) in zip(shards, SHARDS, strict=True):
        probs = np.array([PROBS[key] for key in keys])
        rows = [(key, int(p.argmax()), p.max()) for key, p in zip(keys, probs, strict=True)]
        log_probs = np.log(probs)
        whole = replace(lab.predictions_of(rows), log_probs=log_probs.astype(np.float16))
        sums = None
        if k is not None:
            cut = cut_to_top_k(log_probs, temperature=1.0, k=k)
            ids, rest = cut.class_ids.astype(np.uint32), cut.rest_mass.astype(np.float32)
            listed = Listed(ids, rest, 3)
            whole = replace(whole, log_probs=cut.log_probs.astype(np.float16), listed=listed)
            sums = cut.sums
        facts = {"bad_samples": {}} | ({} if k is None else {"temperature": 1.0})
        write_predictions(lab.store, labeler, shard.digest, whole, facts, prob_sums=sums)
    specification = labeling.specify(labeler=labeler, corpus=corpus.digest)
    return labeling.finish(lab.store, specification, seconds=0.0)


def selected(lab: Any, manifest: Manifest) -> dict[str, Selection]:
    return {
        stem: from_parquet(
            read_stored(lab.store, manifest.object(f"{i}" * 64)), num_samples=len(keys)
        )
        for i, (stem, keys) in enumerate(SHARDS)
    }


@pytest.mark.parametrize("k", [None, 2], ids=["full", "top_k"])
def test_an_image_is_taken_by_each_of_its_classes_that_has_room_for_it(
    lab: Any, k: int | None
) -> None:
    calibration = "none" if k is None else "temperature"
    manifest = lab.select(plant(lab, k=k), None, rules(calibration=calibration))
    found = selected(lab, manifest)
    assert found["s"].copies.tolist() == [2, 1]
    assert found["t"].copies.tolist() == [1, 2]
    assert found["s"].label.tolist() == [0, 2], "b stands under class 2 alone, its second"
    assert found["t"].label.tolist() == [0, 2]
    assert found["s"].dense_targets(3).tolist() == [[0.5, 0.5, 0], [0, 0, 1]]
    assert found["t"].dense_targets(3).tolist() == [[1, 0, 0], [0, 0.5, 0.5]]
    assert found["s"].target_ids.tolist() == [0, 1], "one class is a hard target"
    summary = read_summary(lab.store, manifest)
    assert (summary["kept"], summary["unique"]) == (6, 4)
    assert [one["copies"] for one in summary["classes"]] == [2, 2, 2]
    assert summary["class_thresholds"] == pytest.approx([0.6, 0.3, 0.0], rel=2e-3)
    assert summary["quota"] == 2
    assert manifest.counts["items"] == {"s": 3, "t": 3}


def test_one_class_an_image_is_the_rule_without_the_option(lab: Any) -> None:
    labels = plant(lab)
    once = rules(balance=TopKConfig(k=2, upsample=False))
    manifest = lab.select(labels, None, once)
    assert [one.copies.tolist() for one in selected(lab, manifest).values()] == [[1, 0], [1, 1]]
    assert "classes_per_image" not in manifest.settings["selection"]["balance"]


def test_order_and_grouping_of_shards_change_nothing(lab: Any, tmp_path: Any) -> None:
    manifests: list[Manifest] = []
    for number, groups in enumerate(([["s", "t"]], [["t"], ["s"]])):
        fresh = lab.in_empty_store(tmp_path / str(number))
        manifests.append(fresh.select(plant(fresh), None, rules(), groups=groups))
    assert manifests[0].objects == manifests[1].objects


def test_the_threshold_is_on_the_image_and_a_quota_of_one_may_leave_some_without_a_class(
    lab: Any,
) -> None:
    once = TopKConfig(k=1, upsample=False, classes_per_image=2)
    chosen = rules(balance=once, threshold=FixedThresholdConfig(confidence=0.55))
    # b, of .5, does not pass. Class 0 takes c, class 1 and class 2 take d; a is left.
    found = selected(lab, lab.select(plant(lab), None, chosen))
    assert found["s"].reason.tolist() == [Reason.OVER_QUOTA, Reason.BELOW_THRESHOLD]
    assert found["t"].copies.tolist() == [1, 2]


def test_the_loss_of_all_copies_is_the_sum_of_the_classes_losses(lab: Any) -> None:
    chosen = selected(lab, lab.select(plant(lab), None, rules()))["t"]
    items = np.repeat(np.arange(2), chosen.copies)
    targets = torch.tensor(chosen.dense_targets(3)[items])
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.3, -1.0, 2.0]])
    loss = soft_cross_entropy(logits[items], targets).sum()
    # c as class 0, d as class 2 and as class 1.
    log_probs = logits.log_softmax(dim=1)
    assert loss.item() == pytest.approx(
        -(log_probs[0, 0] + log_probs[1, 2] + log_probs[1, 1]).item(), rel=1e-6
    )


def test_an_explanation_names_the_classes_that_took_the_image(lab: Any) -> None:
    labels = plant(lab)
    manifest = lab.select(labels, None, rules())
    shard = Shard("t", "1" * 64, 2, 9)
    told = explain_round(
        lab.store, shard, "d", labeling=labels, selection=manifest, class_names=lab.class_names
    )
    assert told is not None
    assert told.judgement.target == "hard"
    assert [(one.label, one.probability) for one in told.judgement.target_top] == [
        ("blue", pytest.approx(0.5, rel=1e-3)),
        ("green", pytest.approx(0.5, rel=1e-3)),
    ]


def test_more_classes_than_are_known_of_an_image_are_refused(lab: Any) -> None:
    wide = TopKConfig(k=2, upsample=False, classes_per_image=4)
    with pytest.raises(ValueError, match=r"=4 is more than the 3 classes that there are"):
        lab.select(plant(lab), None, rules(balance=wide))
    three = wide.model_copy(update={"classes_per_image": 3})
    with pytest.raises(ValueError, match=r"=3 is more than the 2 classes that these predictions"):
        lab.select(plant(lab, k=2), None, rules(balance=three, calibration="temperature"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "soft"}, "not with target=soft"),
        ({"balance": {"kind": "top_k", "classes_per_image": 2}}, "set upsample: false"),
    ],
    ids=["soft", "upsample"],
)
def test_what_several_classes_rule_out_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        rules(**changes)


def test_a_sample_lists_its_classes_where_they_are_several() -> None:
    selection = Selection.of_several(
        ("x", "y", "z"),
        reason=np.array([Reason.KEPT, Reason.OVER_QUOTA, Reason.KEPT]),
        weight=np.ones(3),
        label=np.array([0, 3, 0]),
        rows=np.array([0, 0, 0, 2]),
        classes=np.array([4, 1, 2, 5]),
    )
    assert selection.copies.tolist() == [3, 0, 1]
    assert selection.label.tolist() == [4, 3, 5]
    assert selection.target_offsets.tolist() == [0, 3, 3, 3]
    assert selection.num_listed == 3 * 3 + 1
    third = np.float32(1 / 3)
    assert selection.dense_targets(6)[0] == pytest.approx([0, third, third, 0, third, 0])
