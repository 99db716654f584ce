"""`selftrain explain` on a whole run: every round of one image, and keys that no round has."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from flows.cli import app
from flows.config import SelfTrainingConfig
from flows.run_status import RunStatus, read_status
from flows.self_training import self_training
from storage.corpus import load_corpus
from storage.store import Store, open_store
from tasks.specifications import read_result

KEY = "unlabeled-0/u003"


@dataclass(frozen=True)
class Run:
    """A run of two rounds on a corpus with an excluded and an undecodable image."""

    store: Store
    folder: Path

    @property
    def status(self) -> RunStatus:
        return read_status(self.store, "tiny")


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory,
    prefect_api: str,
    trained_here: list[str],
    tiny_config: Callable[..., SelfTrainingConfig],
    corpora_folder: Path,
) -> Run:
    folder = tmp_path_factory.mktemp("explained")
    data = folder / "data"
    shutil.copytree(corpora_folder, data)
    (data / "gone.txt").write_text("unlabeled-1/u013\n")
    _break_an_image(data / "unlabeled" / "unlabeled-2.tar")
    config = tiny_config(
        folder / "store",
        "data.exclude=gone.txt",
        "max_bad_samples=1",
        "baseline=false",
        "selection.allow_collapse=true",
        data=data,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flows.views.write_report", lambda store, status, inputs: None)
        self_training(config)
    return Run(open_store(str(folder / "store")), folder)


def test_json_tells_every_round_with_what_made_it(run: Run) -> None:
    answer = json.loads(_explain(run, KEY, "--json").stdout)

    assert answer["schema"] == 1
    assert (answer["run"], answer["key"]) == ("tiny", KEY)
    shard = answer["shard"]
    corpus = load_corpus(run.store, answer["corpus"])
    assert shard["stem"] == "unlabeled-0"
    assert shard["digest"] == corpus.shard("unlabeled-0").digest
    assert shard["url"] == str(run.folder / "data" / "unlabeled" / "unlabeled-0.tar")
    # u003 is an image of class 3 % 3 = 0, and its shard has labels.
    assert answer["truth"] == {"label": "red", "use": "diagnosis only"}
    status = run.status
    assert [one["round_index"] for one in answer["rounds"]] == [
        one.round_index for one in status.rounds if one.pseudo_labels
    ]
    for one in answer["rounds"]:
        before = status.rounds[one["round_index"] - 1]
        assert one["teachers"] == [
            {
                "fingerprint": before.fingerprint,
                "round_index": before.round_index,
                "architecture": "small_cnn-4x1",
            }
        ]
        stages = {s["kind"]: s["fingerprint"] for s in status.rounds[one["round_index"]].stages}
        assert one["fingerprints"]["labeling"] == stages["label"]
        assert one["fingerprints"]["selection"] == stages["select"]
        labeling = read_result(run.store, "label", stages["label"])
        assert labeling is not None
        assert one["fingerprints"]["labeler"] == labeling.inputs["labeler"].fingerprint
        judged = one["judged"]
        assert judged.keys() >= {
            *("label", "confidence", "calibrated_confidence", "debiased_confidence", "threshold"),
            *("kept_from", "kept", "reason", "reason_in_words", "copies", "weight", "target"),
            *("target_top", "rest_mass"),
        }
        assert one["predicted"] == one["top"][0]["label"]
        assert one["confidence"] == pytest.approx(one["top"][0]["probability"], rel=2e-3)
        assert judged["threshold"] == 0.4
        assert judged["kept"] == (judged["copies"] > 0) == (judged["reason"] == "kept")
    labels = [one["judged"]["label"] for one in answer["rounds"]]
    assert answer["label_flips"] == sum(a != b for a, b in pairwise(labels))
    assert answer["unfinished_rounds"] == []


def test_the_table_has_a_column_for_each_round(run: Run) -> None:
    printed = _explain(run, KEY).stdout
    assert "round 1" in printed
    assert "true label: red (diagnosis only" in printed
    assert "class kept from" in printed
    assert str(run.folder / "data" / "unlabeled" / "unlabeled-0.tar") in printed


def test_a_picture_is_written_and_the_same_each_time(run: Run, tmp_path: Path) -> None:
    pictures = [tmp_path / "a.png", tmp_path / "b.png"]
    for picture in pictures:
        _explain(run, KEY, "--image", str(picture), "--json")
    with Image.open(pictures[0]) as image:
        assert image.format == "PNG"
        assert min(image.size) >= 400
    assert pictures[0].read_bytes() == pictures[1].read_bytes()


def test_only_the_one_shards_predictions_are_read(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    monkeypatch.setattr(
        "tasks.explaining.read_predictions",
        lambda store, record: read.append(record["shard"]) or read_predictions(store, record),
    )
    from storage.predictions import read_predictions

    digest = json.loads(_explain(run, KEY, "--json").stdout)["shard"]["digest"]
    assert set(read) == {digest}


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("unlabeled-0/u004x", "nearest: unlabeled-0/u004"),
        ("unlabelled-0/u004", "has no shard 'unlabelled-0'; it has 5"),
        ("u004", "is no sample key: it is <shard stem>/<webdataset key>"),
        ("dev-0/d003", "shard 'dev-0' is of data.dev"),
        ("labeled-1/l009", "shard 'labeled-1' is of data.labeled"),
        ("test-0/t001", "shard 'test-0' is of data.test"),
        ("unlabeled-1/u013", "is excluded: data.exclude named it"),
        ("unlabeled-2/u020", "could not be decoded and was skipped"),
    ],
)
def test_a_key_that_no_round_has_is_said_to_be_so(run: Run, key: str, message: str) -> None:
    refused = _explain(run, key, "--json", expect=2)
    assert message in " ".join(refused.stderr.split())
    assert refused.stdout == ""


def test_a_misspelt_shard_names_the_nearest(run: Run) -> None:
    assert "nearest: unlabeled-0" in _explain(run, "unlabelled-0/u004", expect=2).stderr


def test_a_run_that_has_not_selected_says_so(
    run: Run, tiny_config: Callable[..., SelfTrainingConfig]
) -> None:
    from flows.opening import open_run

    config = tiny_config(run.store.url, name="opened", data=run.folder / "data")
    open_run(run.store, config)
    refused = _explain(run, KEY, name="opened", expect=1)
    assert "has finished no selection yet: `selftrain resume opened`" in refused.stderr


def _break_an_image(shard: Path) -> None:
    """Put zeros over the first image of a shard, whose tar stays whole."""
    data = bytearray(shard.read_bytes())
    size = int(data[124:135], 8)
    data[512 : 512 + size] = bytes(size)
    shard.write_bytes(data)


def _explain(run: Run, key: str, *options: str, name: str = "tiny", expect: int = 0) -> Result:
    arguments = ["explain", name, key, f"--store={run.store.url}", *options]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == expect, (result.output, result.exception)
    return result
