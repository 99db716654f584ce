"""`selftrain label` and `selftrain select` without a run: what is written, reused and refused."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from typer.testing import CliRunner, Result

from flows.cli import app
from models.description import load_model
from storage.objects import read_object
from tasks import labeling
from tasks.images import clean_view, decode_image
from tasks.prediction import export_model

pytestmark = pytest.mark.usefixtures("prefect_api")


@pytest.fixture
def world(lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "World":
    """An exported model, four of the five unlabelled shards, and a count of what is labelled."""
    monkeypatch.delenv("SELFTRAIN_STORE", raising=False)
    fingerprint = lab.train().fingerprint
    export_model(lab.store, fingerprint, tmp_path / "model")
    corpus = tmp_path / "corpus"
    shutil.copytree(lab.folder / "unlabeled", corpus)
    (corpus / "unlabeled-4.tar").unlink()
    labelled: list[str] = []
    predict = labeling.predict_shards

    def counting(*arguments: Any, **options: Any) -> Any:
        for shard, predicted in predict(*arguments, **options):
            labelled.append(shard.budget.stem)
            yield shard, predicted

    monkeypatch.setattr(labeling, "predict_shards", counting)
    return World(lab, tmp_path, fingerprint, labelled)


class World:
    def __init__(self, lab: Any, folder: Path, fingerprint: str, labelled: list[str]) -> None:
        self.lab = lab
        self.folder = folder
        self.fingerprint = fingerprint
        self.labelled = labelled
        """Stems of the shards that were labelled, in order."""
        self.model, self.corpus, self.labels, self.out = (
            str(folder / name) for name in ("model", "corpus", "labels", "out")
        )

    def label(self, *options: str, **changes: Any) -> Any:
        return json.loads(
            _invoke("label", self.model, self.corpus, self.labels, *options, "--json").stdout
        )

    def select(self, *options: str) -> Any:
        return json.loads(
            _invoke(
                *("select", self.labels, self.out, "--device=cpu", "--allow-collapse", "--json"),
                *options,
            ).stdout
        )

    def grow(self) -> None:
        name = "unlabeled-4.tar"
        shutil.copy(self.lab.folder / "unlabeled" / name, Path(self.corpus) / name)


def test_labels_are_the_models_and_read_in_one_line(world: World) -> None:
    answer = world.label("--device=cpu")

    assert (answer["schema"], answer["kind"], answer["complete"]) == (1, "predictions", True)
    assert (answer["samples"], answer["labeled"], answer["bad_samples"]) == (40, 40, {})
    assert (answer["files"], answer["files_written"], answer["log_probs"]) == (4, 4, True)
    assert answer["store"] == f"{world.labels}-store"
    assert answer["class_names"] == ["red", "green", "blue"]
    # As docs/interfaces.md has it.
    table = pyarrow.parquet.read_table(f"{world.labels}/shards")
    assert table.column_names[:4] == ["key", "label", "label_id", "confidence"]
    assert {"margin", "entropy", "log_probs"} <= set(table.column_names)
    assert "true_label" not in table.column_names
    rows = {row["key"]: row for row in table.to_pylist()}
    assert len(rows) == 40
    model = load_model(world.model)
    for number in (0, 7, 12):
        data = world.lab.png(number % 3, 3000 + number, hardness=0.8 * (number % 5) / 4)
        view = clean_view(decode_image(data, where="test"), 8, 0, "bilinear")
        probs = model.probabilities(np.stack([view])).numpy()[0]
        row = rows[f"unlabeled-{number // 10}/u{number:03d}"]
        assert row["label"] == model.class_names[int(probs.argmax())]
        assert row["label_id"] == int(probs.argmax())
        assert row["confidence"] == pytest.approx(float(probs.max()), abs=1e-5)
        assert np.exp(row["log_probs"]) == pytest.approx(probs, abs=2e-3)
    index = json.loads(Path(world.labels, "index.json").read_text())
    assert [part["stem"] for part in index["parts"]] == [f"unlabeled-{i}" for i in range(4)]
    assert all(Path(world.labels, part["file"]).is_file() for part in index["parts"])


def test_a_second_time_nothing_is_labelled_and_a_grown_corpus_costs_its_new_shard(
    world: World,
) -> None:
    world.label()
    assert sorted(world.labelled) == [f"unlabeled-{i}" for i in range(4)]
    again = world.label()
    assert (len(world.labelled), again["files_written"]) == (4, 0)
    world.grow()
    grown = world.label()
    assert world.labelled[4:] == ["unlabeled-4"]
    assert (grown["files"], grown["files_written"], grown["samples"]) == (5, 1, 50)
    assert pyarrow.parquet.read_table(f"{world.labels}/shards").num_rows == 50
    # A file that somebody lost is written again, of what the store has.
    Path(world.labels, "shards", "part-unlabeled-0.parquet").unlink()
    assert world.label()["files_written"] == 1
    # And one whose shard the corpus has no more is taken away.
    Path(world.corpus, "unlabeled-0.tar").unlink()
    assert world.label()["samples"] == 40
    assert pyarrow.parquet.read_table(f"{world.labels}/shards").num_rows == 40
    assert len(world.labelled) == 5


def test_an_engine_labels_the_same_elsewhere_than_in_this_process(world: World) -> None:
    world.label("--engine={kind: local, processes: 0}")
    here = pyarrow.parquet.read_table(f"{world.labels}/shards")
    assert len(world.labelled) == 4
    shutil.rmtree(f"{world.labels}-store")
    shutil.rmtree(world.labels)
    world.label("--engine={kind: local, processes: 2}")
    assert len(world.labelled) == 4
    assert pyarrow.parquet.read_table(f"{world.labels}/shards").equals(here)


def test_damaged_predictions_are_made_again_before_they_are_given_away(world: World) -> None:
    world.label()
    part = Path(world.labels, "shards", "part-unlabeled-2.parquet")
    given_away = part.read_bytes()
    part.unlink()
    digest = world.lab.unlabeled.shard("unlabeled-2").digest
    (stored,) = Path(f"{world.labels}-store").glob(f"predictions/*/{digest}-*.parquet")
    whole = stored.read_bytes()
    stored.write_bytes(whole[:100] + b"??" + whole[102:])

    answer = world.label()

    assert (answer["complete"], answer["files_written"]) == (True, 1)
    assert world.labelled[4:] == ["unlabeled-2"]
    assert (stored.read_bytes(), part.read_bytes()) == (whole, given_away)


def test_files_without_log_probs_hold_scalars_alone(world: World) -> None:
    world.label("--no-log-probs")
    assert pyarrow.parquet.read_table(f"{world.labels}/shards").column_names == [
        *("key", "label", "label_id", "confidence", "margin", "entropy"),
    ]
    refused = _invoke("label", world.model, world.corpus, world.labels, expect=2)
    assert "log_probs is False there, True asked for" in refused.stderr


def test_both_folders_may_be_urls(world: World) -> None:
    world.labels, world.out = "memory://standalone/labels", "memory://standalone/out"
    world.label(f"--store={world.folder / 'store'}")
    answer = world.select("--confidence=0")
    assert answer["out"] == world.out
    rows = 0
    for part in json.loads(read_object(f"{world.out}/index.json"))["parts"]:
        data = pyarrow.BufferReader(read_object(f"{world.out}/{part['file']}"))
        rows += pyarrow.parquet.read_table(data).num_rows
    assert rows == answer["unique"] == 40


def test_an_exported_model_is_its_own_in_the_store_that_it_came_from(world: World) -> None:
    store = f"--store={world.lab.store.url}"
    assert world.label(store)["models"] == [world.fingerprint]
    assert len(world.labelled) == 4
    for number, name in enumerate(
        (world.fingerprint, world.lab.store.url_of(f"models/{world.fingerprint}"))
    ):
        out = str(world.folder / f"by-name-{number}")
        answer = json.loads(_invoke("label", name, world.corpus, out, store, "--json").stdout)
        assert answer["models"] == [world.fingerprint]
    assert len(world.labelled) == 4


def test_several_models_label_as_the_mean_of_their_probabilities(world: World) -> None:
    second = world.lab.train(world.lab.order(seed=1)).fingerprint
    export_model(world.lab.store, second, world.folder / "second")
    both = f"{world.model},{world.folder / 'second'}"
    answer = json.loads(_invoke("label", both, world.corpus, world.labels, "--json").stdout)
    assert len(answer["models"]) == 2
    rows = pyarrow.parquet.read_table(f"{world.labels}/shards").to_pylist()
    image = decode_image(world.lab.png(0, 3003, hardness=0.8 * 3 / 4), where="test")
    view = np.stack([clean_view(image, 8, 0, "bilinear")])
    probs = [load_model(m).probabilities(view).numpy()[0] for m in both.split(",")]
    row = next(row for row in rows if row["key"] == "unlabeled-0/u003")
    assert np.exp(row["log_probs"]) == pytest.approx(np.mean(probs, axis=0), abs=2e-3)
    # Dev is labelled by both, too, and calibrates their mean.
    calibrated = world.select("--confidence=0", f"--dev={world.lab.folder / 'dev'}")
    assert calibrated["calibration"] == "temperature"
    assert world.labelled[4:] == ["dev-0"]


def test_predictions_of_the_top_k_form_are_calibrated_on_the_dev_split_of_their_labelling(
    world: World,
) -> None:
    how = world.folder / "labeling.yaml"
    how.write_text("form: top_k\nk: 2\n")
    world.label(f"--config={how}", f"--dev={world.lab.folder / 'dev'}")
    table = pyarrow.parquet.read_table(f"{world.labels}/shards")
    assert {"class_ids", "log_probs", "rest_mass"} <= set(table.column_names)
    assert {len(ids) for ids in table.column("class_ids").to_pylist()} == {2}


def test_kept_pseudo_labels_reach_the_confidence_and_the_summary_counts_them(world: World) -> None:
    world.label()
    predictions = pyarrow.parquet.read_table(f"{world.labels}/shards").to_pylist()
    confident = {row["key"]: row for row in predictions if row["confidence"] >= 0.7}
    assert 0 < len(confident) < 40

    answer = world.select("--confidence=0.7")

    assert (answer["schema"], answer["kind"], answer["calibration"]) == (1, "selection", "none")
    assert (answer["unique"], answer["kept"]) == (len(confident), len(confident))
    rows = pyarrow.parquet.read_table(f"{world.out}/shards").to_pylist()
    assert {row["key"] for row in rows} == set(confident)
    for row in rows:
        there = confident[row["key"]]
        assert (row["label"], row["confidence"]) == (there["label"], there["confidence"])
        assert (row["copies"], row["weight"], len(row["target_ids"])) == (1, 1.0, 3)
    summary = json.loads(Path(world.out, "summary.json").read_text())
    assert summary["reasons"]["below_threshold"] == 40 - len(confident)
    printed = _invoke(
        *("select", world.labels, world.out, "--confidence=0.7", "--allow-collapse")
    ).stdout
    assert "calibration: none; confidences are the model's own" in printed
    assert "4 files in" in printed
    assert "0 written now" in printed


def test_a_quota_of_each_class_and_rejected_rows_with_their_reason(world: World) -> None:
    world.label()
    answer = world.select("--confidence=0", "--per-class=3", "--target=hard", "--rejected")
    rows = pyarrow.parquet.read_table(f"{world.out}/shards").to_pylist()
    assert len(rows) == 40
    assert "target_ids" not in rows[0]
    copies = Counter[str]()
    for row in rows:
        assert row["kept"] == (row["copies"] > 0) == (row["reason"] == "kept")
        copies[row["label"]] += row["copies"]
    # Each class that occurs has three, the smaller by copies.
    assert set(copies.values()) == {3}
    assert answer["kept"] == 3 * len(copies)
    assert {row["reason"] for row in rows} <= {"kept", "over_quota"}


def test_dev_calibrates_and_rules_may_come_from_a_file(world: World) -> None:
    world.label()
    rules = world.folder / "rules.yaml"
    rules.write_text("threshold: {kind: percentile, step: 50}\nbalance: {kind: none}\n")
    rules.write_text(rules.read_text() + "allow_collapse: true\n")
    command = ["select", world.labels, world.out, f"--config={rules}", "--json"]
    dev = f"--dev={world.lab.folder / 'dev'}"

    answer = json.loads(_invoke(*command, dev).stdout)

    assert answer["calibration"] == "temperature"
    assert answer["temperature"] > 0
    assert answer["ece_after"] >= 0
    assert answer["rules"]["selection"]["threshold"] == {"kind": "percentile", "step": 50}
    # Half of 40, and what ties with the last.
    assert 20 <= answer["unique"] < 30
    refused = _invoke(*command, expect=2)
    assert "holds a selection of something else: rules is" in refused.stderr


def test_labelled_shards_give_the_class_shares_that_rules_read(world: World) -> None:
    world.label()
    labeled = f"--labeled={world.lab.folder / 'labeled'}"
    world.select("--debias=distribution_alignment", labeled)
    summary = json.loads(Path(world.out, "summary.json").read_text())
    assert summary["labeled_counts"] == [8, 8, 8]
    world.out += "-uniform"
    world.select("--debias=distribution_alignment")
    uniform = json.loads(Path(world.out, "summary.json").read_text())
    # The labels are balanced, so both align to the same.
    assert uniform["debias"] == summary["debias"]
    assert "labeled_counts" not in uniform


def test_excluded_keys_are_in_no_output_and_cost_their_shard_alone(world: World) -> None:
    world.label()
    keys = world.folder / "gone.txt"
    keys.write_text("unlabeled-1/u013\nelsewhere/1\n")
    answer = world.select("--confidence=0", f"--exclude={keys}")
    assert answer["samples"] == 39
    table = pyarrow.parquet.read_table(f"{world.out}/shards")
    assert "unlabeled-1/u013" not in table.column("key").to_pylist()
    assert world.labelled[4:] == ["unlabeled-1"]
    world.labels += "-without"
    store = f"--store={world.folder / 'labels-store'}"
    assert world.label(f"--exclude={keys}", store)["labeled"] == 39
    assert len(world.labelled) == 5


def test_undecodable_images_are_listed_within_their_budget(world: World) -> None:
    shard = Path(world.corpus, "unlabeled-2.tar")
    data = bytearray(shard.read_bytes())
    data[512 : 512 + 64] = bytes(64)
    shard.write_bytes(data)
    refused = _invoke("label", world.model, world.corpus, world.labels, expect=1)
    assert "max_bad_samples=0" in refused.stderr
    answer = world.label("--max-bad-samples=1")
    assert (answer["samples"], answer["labeled"]) == (40, 39)
    assert list(answer["bad_samples"]) == ["unlabeled-2/u020"]


def test_a_stopped_command_ends_with_3_and_goes_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = labeling.write_predictions
    written: list[str] = []

    def stopped(*arguments: Any, **options: Any) -> Any:
        if len(written) == 2:
            raise labeling.LabelingStopped("stopped after 20 images of this group")
        written.append(arguments[2])
        return real(*arguments, **options)

    monkeypatch.setattr(labeling, "write_predictions", stopped)
    result = _invoke("label", world.model, world.corpus, world.labels, expect=3)
    assert "go on with: the same command" in result.stderr
    monkeypatch.setattr(labeling, "write_predictions", real)
    world.labelled.clear()
    assert world.label()["labeled"] == 40
    assert len(world.labelled) == 2


def test_what_cannot_be_is_refused_by_name(world: World) -> None:
    def refused(*arguments: str, expect: int = 2) -> str:
        return " ".join(_invoke(*arguments, expect=expect).stderr.split())

    labels, out = world.labels, world.out
    assert "neither a folder that `selftrain export` wrote" in refused(
        *("label", "nightly", world.corpus, labels)
    )
    assert "holds no model.json" in refused("label", "./no/model", world.corpus, labels)
    assert "names no model" in refused("label", ",", world.corpus, labels)
    assert "CORPUS: " in refused("label", world.model, "./nowhere", labels, expect=1)
    assert "holds no predictions: make them with `selftrain label" in refused(
        *("select", labels, out), expect=1
    )
    world.label()
    assert "--per-class has no effect with --balance cap_min" in refused(
        *("select", labels, out, "--per-class=3", "--balance=cap_min")
    )
    rules = world.folder / "rules.yaml"
    rules.write_text("calibration: temperature\n")
    assert "calibration=temperature is fitted on labelled images" in refused(
        *("select", labels, out, f"--config={rules}")
    )
    assert "holds all rules" in refused(
        *("select", labels, out, f"--config={rules}", "--target=hard")
    )
    rules.write_text("treshold: {}\n")
    assert "treshold" in refused("select", labels, out, f"--config={rules}")
    rules.write_text("calibration: none\n")
    assert "has no effect with calibration: none" in refused(
        *("select", labels, out, f"--config={rules}", f"--dev={world.lab.folder / 'dev'}")
    )
    rules.write_text("form: top_k\nk: 2\n")
    assert "form=top_k may be calibrated on labelled images" in refused(
        *("label", world.model, world.corpus, f"{labels}-k", f"--config={rules}")
    )
    for engine, fault in (
        ("spark", "'spark' found using 'kind' does not match any of the expected tags"),
        ("{kind: local, proceses: 2}", "local.proceses: Extra inputs are not permitted"),
        ("[dask]", "(all): Input should be a valid dictionary"),
        ("{kind: dask", "while parsing a flow mapping"),
    ):
        stderr = refused("label", world.model, world.corpus, labels, f"--engine={engine}")
        assert stderr.count(f"--engine {engine}: ") == 1
        assert fault in stderr
    assert "holds predictions, not a selection" in refused("select", labels, labels)
    foreign = Path(out, "shards")
    foreign.mkdir(parents=True)
    (foreign / "mine.parquet").write_bytes(b"")
    assert "first 'mine.parquet', but there is no index.json of selftrain" in refused(
        *("select", labels, out, "--confidence=0", "--allow-collapse")
    )


def test_the_folder_of_another_model_is_refused(world: World) -> None:
    world.label()
    other = world.lab.train(world.lab.order(seed=1)).fingerprint
    refused = _invoke(
        *("label", other, world.corpus, world.labels, f"--store={world.lab.store.url}"), expect=2
    )
    assert "holds predictions of something else: models is" in refused.stderr
    assert len(world.labelled) == 4
    how = world.folder / "labeling.yaml"
    how.write_text("view: {kind: hflip}\n")
    refused = _invoke(
        *("label", world.model, world.corpus, world.labels, f"--config={how}"), expect=2
    )
    assert "holds predictions of something else: labeler is" in refused.stderr


def _invoke(*arguments: str, expect: int = 0) -> Result:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == expect, (result.output, result.exception)
    return result
