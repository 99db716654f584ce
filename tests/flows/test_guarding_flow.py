"""The leak guard in a run: planted copies are dropped in every round, and it is computed once."""

import io
import shutil

import pytest
from PIL import Image

from flows.planning import plan_run
from flows.run_status import read_status
from flows.self_training import self_training
from storage.runs import read_events
from storage.store import open_store
from tasks.guarding import read_leaks
from tasks.selection import read_summary
from tasks.specifications import read_result


def flipped(png):
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png)).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def data(lab, tmp_path):
    """The corpora with a shard more: five dev and five test images, mirrored."""
    folder = tmp_path / "data"
    shutil.copytree(lab.folder, folder)
    copies = [
        (f"copy-{key}", flipped(image), None)
        for key, image, _ in [
            *lab.images_of("d", 5, start=1000, hardness=0.7),
            *lab.images_of("t", 5, start=2000, hardness=0.7),
        ]
    ]
    lab.write_shard(folder / "unlabeled" / "unlabeled-9.tar", copies)
    return folder


def test_a_run_drops_copies_of_dev_and_test_in_every_round_and_searches_once(
    tmp_path, prefect_api, trained_here, tiny_config, monkeypatch, data
):
    monkeypatch.setattr("flows.views.write_report", lambda store, status, inputs: None)
    config = tiny_config(
        tmp_path / "store",
        "baseline=false",
        "selection={threshold: {kind: fixed, confidence: 0}, balance: {kind: none},"
        " leak_guard: {kind: near_duplicates}, out_of_domain: {kind: max_prob,"
        " min_confidence: 0.34}, allow_collapse: true}",
        data=data,
    )
    store = open_store(str(tmp_path / "store"))
    planned = [stage for stage in plan_run(store, config) if stage.kind == "guard"]
    assert [(stage.round_index, stage.samples, stage.shards) for stage in planned] == [(1, 60, 6)]
    assert not planned[0].assumed
    self_training(config)
    status = read_status(store, "tiny")
    guards = [stage for one in status.rounds for stage in one.stages if stage["kind"] == "guard"]
    assert [stage["fingerprint"] for stage in guards] == [planned[0].fingerprint]
    guard = read_result(store, "guard", planned[0].fingerprint)
    assert guard is not None
    assert (guard.counts["leaked_from_dev"], guard.counts["leaked_from_test"]) == (5, 5)
    assert set(read_leaks(store, guard)) == {"unlabeled-9"}
    rounds = [one for one in status.rounds if one.pseudo_labels is not None]
    assert len(rounds) == len(status.rounds) - 1 >= 1
    for one in rounds:
        assert one.pseudo_labels is not None
        assert one.pseudo_labels["leaked"] == 10
        (select,) = [stage for stage in one.stages if stage["kind"] == "select"]
        selection = read_result(store, "select", select["fingerprint"])
        assert selection is not None
        assert selection.counts["items"]["unlabeled-9"] == 0
        assert selection.inputs["leaks"].manifest_sha256 == guard.sha256
        reasons = read_summary(store, selection)["reasons"]
        assert reasons["kept"] + reasons["leaked"] + reasons["out_of_domain"] == 60
    # No label of the test split was read for it, nor is the guard of a later run computed anew.
    assert "guard" in {event.get("kind") for event in read_events(store, "tiny")}
    again = [stage for stage in plan_run(store, config) if stage.kind == "guard"]
    assert [stage.state for stage in again] == ["reused"]
