"""Tests of the report: what it says, that it says n/a, and that it is a page nobody can inject."""

import ast
import base64
import html
import io
import json
import tarfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import tasks.report_svg
from storage.corpus import Shard, save_corpus
from storage.indexing import corpus_from_index, index_shards
from storage.manifest import (
    InputReference,
    Manifest,
    commit_manifest,
    put_object,
    write_provenance,
)
from storage.parquet_files import write_table
from storage.predictions import Predictions, write_predictions
from storage.predictions import to_parquet as predictions_to_parquet
from storage.runs import append_event, create_run
from storage.selections import Reason, Selection
from storage.selections import to_parquet as selection_to_parquet
from storage.store import open_store
from tasks import report_formats as formats
from tasks.evaluation import _report
from tasks.report import render_report, write_report
from tasks.report_costs import StageCost, cost_totals
from tasks.report_evaluation_figures import confusion_figure, most_confused, reliability_figure
from tasks.report_facts import Evaluation, RoundSelection, Training
from tasks.report_figures import curves_figure
from tasks.report_gallery import MAX_BYTES, choose_shards, thumbnail
from tasks.report_selection_figures import class_balance_figure
from tasks.selection_summary import ShardCounts, summarize
from tasks.specifications import folder_of
from tasks.training import _CURVE_SCHEMA

NAMES = ("<script>alert(1)</script>", "$x$ & 'y'", "猫")
KEYS = tuple(f"<img src=x onerror=alert({i})>" for i in range(6))
K, B, O = Reason.KEPT, Reason.BELOW_THRESHOLD, Reason.OVER_QUOTA  # noqa: E741
# Of each of the 6 samples of a shard: predicted class, confidence, true class (-1: unknown), fate.
SAMPLES = {
    "u-0": [
        *((0, 0.99, 0, K), (1, 0.95, 2, K), (2, 0.9, 2, K)),
        *((0, 0.4, 1, B), (1, 0.5, 1, B), (0, 0.97, 0, O)),
    ],
    "u-1": [
        *((0, 0.98, 0, K), (1, 0.96, 1, K), (2, 0.91, 2, K)),
        *((2, 0.41, 0, B), (2, 0.6, 2, B), (1, 0.75, 1, K)),
    ],
}


class TinyRun:
    """A run in a store, made of hand-written results; stages are added one by one."""

    def __init__(self, folder, *, truth=True):
        self.store = open_store(str(folder / "store"))
        self.folder = folder
        self.truth = truth
        self.status = {
            "schema": 1,
            "run": "tiny",
            "state": "unfinished",
            "stop_reason": None,
            "store": self.store.url,
            "versions_mixed": False,
            "labels": {"labeled": 30, "dev": 20, "sum": 50},
            "rounds": [],
            "baseline": None,
            "model_url": None,
            "report_url": f"{self.store.url}/runs/tiny/report.html",
            "tracker_failures": 0,
        }
        self.corpus = self._unlabeled()
        self.inputs = {
            "config": {"name": "tiny", "rounds": 1, "seed": 3, "baseline": True},
            "class_names": list(NAMES),
            "unlabeled": self.corpus.digest,
        }
        pins = {"labeled": "0" * 64, "dev": "1" * 64, "test": None, "unlabeled": self.corpus.digest}
        create_run(self.store, "tiny", {"schema": 1, "config": {}, "pins": pins})

    def _unlabeled(self):
        urls = []
        for number, stem in enumerate(SAMPLES):
            path = self.folder / f"{stem}.tar"
            with tarfile.open(path, "w") as tar:
                for i, key in enumerate(KEYS):
                    info = tarfile.TarInfo(f"{key}.png")
                    data = png((8, 8), (40 * i, 100 * number, 9))
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
            urls.append(str(path))
        corpus, locations = corpus_from_index(index_shards(urls))
        save_corpus(self.store, corpus, locations)
        return corpus

    def new_round(self, index, **facts):
        one = {
            "round_index": index,
            "architecture": None,
            "fingerprint": None,
            "promoted": None,
            "dev_accuracy": None,
            "dev_interval": None,
            "test_accuracy": None,
            "test_interval": None,
            "pseudo_labels": None,
            "seconds": 1.5,
            "stages": [],
        }
        if index is None:
            one = {
                k: v
                for k, v in one.items()
                if k not in ("round_index", "promoted", "pseudo_labels")
            }
            self.status["baseline"] = one
        else:
            self.status["rounds"].append(one)
        one.update(facts)
        return one

    def commit(self, one, kind, *, objects=(), counts=None, inputs=None, versions="1", **more):
        number = len(one["stages"])
        role = one.get("round_index", "baseline")
        fingerprint = f"{kind}-{role}-{number}".encode().hex().ljust(64, "0")
        folder = folder_of(kind, fingerprint)
        stored = tuple(put_object(self.store, folder, *described) for described in objects)
        references = {k: InputReference(v, v) for k, v in (inputs or {}).items()}
        manifest = Manifest(kind, fingerprint, 1, {}, references, stored, counts or {})
        facts = {"seconds": 2.0, "finished": "2026-01-02T03:04:05+00:00", "device": "cpu"} | more
        write_provenance(self.store, folder, {**facts, "versions": {"torch": versions}})
        one["stages"].append(
            {"kind": kind, "fingerprint": fingerprint, "state": "done", "seconds": 2.0}
        )
        return commit_manifest(self.store, folder, manifest)

    def train(self, one, *, accuracies=(0.5, None, 1.0)):
        curve = [
            {"step": 10 * i, "loss": 1 / (i + 1), "labeled_accuracy": value}
            for i, value in enumerate(accuracies)
        ]
        table = write_table(pa.Table.from_pylist(curve, schema=_CURVE_SCHEMA))
        counts = {
            "steps": 20,
            "curve_points": len(curve),
            "labeled_images_seen": 640,
            "pseudo_images_seen": 1920,
            "parameters": 12345,
            "architecture": "small_cnn-8x2",
        }
        one["architecture"] = "small_cnn-8x2"
        objects = [("metrics", table, "parquet")]
        self.commit(one, "train", objects=objects, counts=counts, processes=2)

    def evaluate(self, one, kind, correct, total=10):
        """The first `correct` samples are right."""
        keys = tuple(f"{kind}/{i}" for i in range(total))
        labels = np.array([0 if i < correct else 1 for i in range(total)])
        predictions = predict(keys, labels, np.full(total, 0.8), np.zeros(total))
        report = json.dumps(_report(predictions, NAMES)).encode()
        objects = [
            ("predictions", predictions_to_parquet(predictions), "parquet"),
            ("report", report, "json"),
        ]
        counts = {"samples": total, "classes": 3}
        inputs = {"corpus": "1" * 64}
        self.commit(one, kind, objects=objects, counts=counts, inputs=inputs)
        name = "dev" if kind == "validate" else "test"
        one[f"{name}_accuracy"] = correct / total
        one[f"{name}_interval"] = [0.25, 0.75]

    def select(self, one, *, samples=SAMPLES, **facts):
        labeler = f"{one['round_index']:064x}"
        inputs = {"corpus": self.corpus.digest, "labeler": labeler}
        labeling = self.commit(one, "label", inputs=inputs, counts={"bytes": 1500}, processes=3)
        objects, counts = [], []
        for shard in self.corpus.shards:
            label, confidence, truth, reason = map(np.array, zip(*samples[shard.stem], strict=True))
            predictions = predict(
                KEYS, label, confidence, truth if self.truth else np.full(len(truth), -1)
            )
            write_predictions(self.store, labeler, shard.digest, predictions, {})
            selection = Selection.of(
                KEYS,
                reason=reason,
                copies=np.where(label == 2, 2, 1),
                weight=np.ones(6),
                label=label,
            )
            objects.append((shard.digest, selection_to_parquet(selection), "parquet"))
            counts.append(
                ShardCounts.of(selection, predictions.true_label, predictions.confidence, 3)
            )
        summary = summarize(counts, class_names=NAMES, facts=facts)
        objects.append(("summary", json.dumps(summary).encode(), "json"))
        self.commit(one, "select", objects=objects, inputs={"labeling": labeling.fingerprint})
        names = ("kept", "unique", "precision", "coverage")
        one["pseudo_labels"] = {name: summary[name] for name in names}

    def promote(self, one, is_promoted=True):
        report = {"is_promoted": is_promoted, "difference": 0.2, "interval": [-0.0125, 0.4]}
        data = json.dumps(report).encode()
        self.commit(one, "promote", objects=[("report", data, "json")])
        one["promoted"] = is_promoted

    def finish(self, *, with_test=True, is_promoted=True):
        """Teacher, one student and baseline: 7, 9 and 8 of 10 right on test; 6, 8, 7 on dev."""
        for index, correct in ((0, 7), (1, 9), (None, 8)):
            one = self.new_round(index)
            if index == 1:
                self.select(one)
            self.train(one)
            self.evaluate(one, "validate", correct - 1)
            if with_test:
                self.evaluate(one, "test", correct)
            if index == 1:
                self.promote(one, is_promoted)
        stop_reason = "max_rounds" if is_promoted else "no_gain"
        self.status |= {"state": "done", "stop_reason": stop_reason}
        return self

    def page(self):
        return render_report(self.store, self.status, self.inputs).decode()

    def text(self):
        """What a reader sees, without the figures, which are not drawn either."""
        with pytest.MonkeyPatch.context() as patch:
            for module in (
                *("report_figures", "report_selection_figures"),
                "report_evaluation_figures",
            ):
                patch.setattr(f"tasks.{module}.draw_svg", lambda *_, **__: "")
            return plain(self.page())


def plain(page):
    """Texts of a page, figures included, in one line."""

    class Reader(HTMLParser):
        def __init__(self):
            super().__init__()
            self.found, self.skipped = [], 0

        def handle_starttag(self, tag, attrs):
            self.skipped += tag == "style"

        def handle_endtag(self, tag):
            self.skipped -= tag == "style"

        def handle_data(self, data):
            if not self.skipped:
                self.found.append(data)

    reader = Reader()
    reader.feed(page)
    return " ".join(" ".join(reader.found).split())


def predict(keys, label, confidence, truth):
    n = len(keys)
    probs = np.repeat(((1 - confidence) / 2)[:, None], 3, axis=1)
    probs[np.arange(n), label] = confidence
    return Predictions(
        keys=tuple(keys),
        label=label.astype(np.uint32),
        confidence=confidence.astype(np.float32),
        margin=np.zeros(n, np.float32),
        entropy=np.zeros(n, np.float32),
        log_probs=np.log(probs).astype(np.float16),
        logsumexp=np.zeros(n, np.float32),
        true_label=truth.astype(np.int32),
    )


def png(size, color):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return TinyRun(tmp_path_factory.mktemp("finished")).finish()


@pytest.fixture(scope="module")
def finished_page(finished):
    return finished.page()


def test_headline_compares_student_with_baseline_and_teacher_on_the_same_test_images(finished):
    text = finished.text()
    assert "Done. The one round was run." in text
    assert "Test accuracy 90.0 % 95 % interval [25.0, 75.0] the student of round 1" in text
    # 9 and 8 of the same 10 right, nested. Agresti and Min: centre 1/12, error
    # sqrt(2 - 1/12)/12 = 0.1154, times 1.96: 0.0833 - 0.2261 and 0.0833 + 0.2261.
    assert (
        "Student 1 against baseline +10.0 points 95 % paired interval [−14.3, +30.9] includes 0;"
        " 10 test images"
    ) in text
    # 9 and 7: centre 2/12, error sqrt(3 - 4/12)/12 = 0.1361, times 1.96.
    assert (
        "Student 1 against first teacher +20.0 points 95 % paired interval [−10.0, +43.3]" in text
    )
    assert "Labelled images 50 30 labels + 20 dev 12 unlabelled, 3 classes" in text


def test_rounds_table_has_every_round_and_the_baseline(finished):
    text = finished.text()
    assert "0 (teacher) small_cnn-8x2 60.0 % [25.0, 75.0] 70.0 % [25.0, 75.0] 1.5 s" in text
    # 7 of 12 kept; of the kept one is wrong: u-0's second sample is predicted 1 and is 2.
    assert (
        "1 small_cnn-8x2 80.0 % [25.0, 75.0] 90.0 % [25.0, 75.0] +20.0 [−1.3, +40.0] yes"
        " 7 85.7 % 1.5 s"
    ) in text
    assert "Baseline small_cnn-8x2 70.0 % [25.0, 75.0] 80.0 % [25.0, 75.0] 1.5 s" in text
    assert "30 labels + 20 dev = 50 labelled images." in text


def test_pseudo_label_table_counts_reasons_and_copies(finished):
    # 12 predictions, 7 kept (58.3 %), class 2 twice: 9 items; 4 below the threshold, 1 over quota;
    # nothing was calibrated.
    assert "1 12 7 58.3 % 9 85.7 % 7 4 1 n/a n/a" in finished.text()
    assert "Uncalibrated confidence of all predictions in 20 bins" in finished.text()


class _Strict(HTMLParser):
    """Collects tags and whatever a browser could be made to fetch or run."""

    def __init__(self):
        super().__init__()
        self.tags, self.links, self.handlers = set(), [], []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
                self.links.append(value)
            if name.startswith("on"):
                self.handlers.append((tag, name))


def test_page_is_self_contained_and_holds_nothing_that_runs(finished_page):
    parser = _Strict()
    parser.feed(finished_page)
    assert parser.handlers == []
    assert parser.tags.isdisjoint({"script", "iframe", "object", "embed", "base", "form"})
    assert [link for link in parser.links if not link.startswith(("#", "data:"))] == []
    for reference in ("url(http", "@import", "http:", "https:", "//www"):
        assert reference not in finished_page
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in finished_page


def test_class_names_and_keys_are_shown_as_text(finished_page):
    assert "<script" not in finished_page
    assert "<img src=x" not in finished_page
    assert html.escape("<script>alert(1)</script>") in finished_page
    shown = plain(finished_page)
    # In the tables, and in the figure: cut, as mathematics never, in any script.
    assert "<script>alert(1)</script> 4 2 2" in shown
    assert "<scrip…ript>" in shown
    assert "$x$ & 'y'" in shown
    assert shown.count("猫") >= 2


def test_every_figure_is_drawn_in_colours_of_the_page(finished_page):
    assert finished_page.count('<svg class="figure" role="img"') == 6
    assert "currentColor" in finished_page
    assert "var(--blue)" in finished_page
    figures = finished_page.split("</style>", 1)[1]
    assert "#0072b2" not in figures
    assert "#010203" not in figures


def test_same_run_gives_the_same_bytes(finished, finished_page):
    assert finished.page() == finished_page


def test_report_is_written_beside_the_run(finished):
    url = write_report(finished.store, finished.status, finished.inputs)
    assert url == f"{finished.store.url}/runs/tiny/report.html"
    assert finished.store.read("runs/tiny/report.html").decode() == finished.page()


def test_gallery_shows_most_and_least_confident_first(finished, monkeypatch):
    monkeypatch.setattr("tasks.report_gallery.IMAGES_PER_GROUP", 2)
    page = finished.page().split('<section id="gallery">')[1].split("</section>")[0]
    found = [
        plain(group).replace(NAMES[0], "A").replace(NAMES[1], "B")
        for group in page.split("<h4>")[1:]
    ]
    assert found == [
        "Kept, most confident · 2 of 7 A 0.990 ✓ true A 0.980 ✓ true",
        "Kept, least confident · 2 of 7 B 0.750 ✓ true 猫 0.900 ✓ true",
        "Kept although wrong, most confident · 1 of 1 B 0.950 ✗ is 猫",
        "Rejected: below threshold, most confident · 2 of 4 猫 0.600 ✓ true B 0.500 ✓ true",
        "Rejected: over quota, most confident · 1 of 1 A 0.970 ✓ true",
    ]
    # 2 + 2 + 1 + 2 + 1 images, of 8 x 8 pixels each: drawn as squares.
    assert page.count('<img class="tiny" src="data:image/png;base64,') == 8


def test_missing_shard_is_named_and_the_page_is_written_all_the_same(tmp_path):
    run = TinyRun(tmp_path).finish()
    (tmp_path / "u-1.tar").unlink()
    text = run.text()
    assert "shard u-1: nothing at" in text
    assert "Kept, most confident · 7 of 7" in text


def test_unknown_truth_is_said_to_be_unknown(tmp_path):
    text = TinyRun(tmp_path, truth=False).finish().text()
    assert "1 12 7 58.3 % 9 n/a 0 4 1" in text
    assert "Accuracy by confidence: n/a, the corpus holds no true labels." in text
    assert "truth n/a" in text
    assert "Kept although wrong" not in text
    assert "✗" not in text


def test_without_test_split_dev_is_compared_and_test_is_not_available(tmp_path):
    text = TinyRun(tmp_path).finish(with_test=False).text()
    assert "Dev accuracy 80.0 %" in text
    assert "the student of round 1, the result (test n/a; dev steers the run)" in text
    assert "+10.0 points 95 % paired interval [−14.3, +30.9] includes 0; 10 dev images" in text
    assert "0 (teacher) small_cnn-8x2 60.0 % [25.0, 75.0] n/a 1.5 s" in text
    assert "Test n/a the run has no such split" in text


def test_run_whose_student_is_not_promoted_says_so(tmp_path):
    text = TinyRun(tmp_path).finish(is_promoted=False).text()
    assert "Done, no gain. The student of round 1 is worse on dev than its teacher" in text
    assert "Test accuracy 70.0 %" in text
    assert "the teacher of round 0, the result" in text
    assert "Student 1 against first teacher +20.0 points" in text


def test_run_before_any_event_renders(tmp_path):
    text = TinyRun(tmp_path).text()
    assert "Not finished." in text
    assert "Started n/a, last event n/a." in text
    assert "No stage has begun yet." in text
    assert "No training is finished yet." in text
    assert text.count("No selection is finished yet.") == 2


def test_run_after_its_teacher_renders(tmp_path):
    run = TinyRun(tmp_path)
    append_event(run.store, "tiny", "run_started")
    teacher = run.new_round(0)
    run.train(teacher)
    run.evaluate(teacher, "validate", 6)
    student = run.new_round(1)
    student["stages"] = [
        {"kind": "label", "fingerprint": "a" * 64, "state": "partial", "seconds": None},
        {"kind": "select", "fingerprint": "b" * 64, "state": "pending", "seconds": None},
    ]
    text = run.text()
    assert "selftrain resume tiny goes on where it was." in text
    assert "the teacher of round 0, the result so far (test n/a; dev steers the run)" in text
    assert "Student against baseline n/a trained after the last round" in text
    assert "Student against first teacher n/a no student was evaluated yet" in text
    assert "label partial n/a n/a n/a " + "a" * 64 in text
    assert run.page().count("<svg ") == 4  # of models; no selection yet


def test_failed_run_says_what_it_died_of(tmp_path):
    run = TinyRun(tmp_path)
    append_event(run.store, "tiny", "run_failed", error="OSError", message="<i>disk</i> full")
    run.status["state"] = "failed"
    assert "OSError: <i>disk</i> full" in run.text()
    assert "<i>disk" not in run.page()


def test_a_tracker_that_was_not_reached_is_a_warning_with_the_last_reason(tmp_path):
    run = TinyRun(tmp_path)
    assert "did not reach" not in run.text()
    for message in ("first", "<b>second"):
        facts = {"tracker": "mlflow", "error": "MlflowException", "message": message}
        append_event(run.store, "tiny", "tracker_failed", **facts)
    run.status["tracker_failures"] = 2
    assert "Metrics did not reach a tracker 2 times, last:" in run.text()
    assert "mlflow: MlflowException: <b>second. Nothing is lost" in run.text()


def test_given_teacher_without_training_renders(tmp_path):
    run = TinyRun(tmp_path)
    run.evaluate(run.new_round(0), "validate", 6)
    assert "0 (teacher) n/a 60.0 % [25.0, 75.0] n/a" in run.text()


def test_mixed_library_versions_are_marked_stage_by_stage(tmp_path):
    run = TinyRun(tmp_path)
    one = run.new_round(0)
    run.commit(one, "promote", versions="1.0")
    run.commit(one, "promote", versions="2.0")
    run.status["versions_mixed"] = True
    text = run.text()
    assert "computed under different library versions" in text
    assert "Set torch Stages 1 1.0 1 2 2.0 1" in text


def flipped(samples, flips):
    """The samples with other classes: (stem, row) -> class."""
    return {
        stem: [(flips.get((stem, row), one[0]), *one[1:]) for row, one in enumerate(rows)]
        for stem, rows in samples.items()
    }


def test_labels_that_flipped_between_rounds_are_shown_with_what_they_were(tmp_path):
    run = TinyRun(tmp_path)
    run.select(run.new_round(1))
    # Of confidence 0.95 and 0.41: in the first round B, and C.
    flips = {("u-0", 1): 2, ("u-1", 3): 0}
    run.select(run.new_round(2), samples=flipped(SAMPLES, flips))
    page = run.page().split('<section id="gallery">')[1].split("</section>")[0]
    second, first = page.split("<details")[1:]
    assert "Label flipped" not in first
    assert plain(second.split("Label flipped")[1]).replace(NAMES[0], "A").replace(
        NAMES[1], "B"
    ) == (
        "since the round before, most confident · 2 of 2"
        " 猫 0.950 was B ✓ true A 0.410 was 猫 ✓ true"
    )


def test_gallery_of_the_oldest_round_shown_knows_the_round_before_it(tmp_path):
    run = TinyRun(tmp_path)
    for index in range(1, 5):
        flips = {("u-0", 0): 1} if index == 2 else {}
        run.select(run.new_round(index), samples=flipped(SAMPLES, flips))
    page = run.page().split('<section id="gallery">')[1].split("</section>")[0]
    shown = ["Label flipped" in one for one in page.split("<details")[1:]]
    assert shown == [False, True, True]  # rounds 4, 3 and 2; back in 3, and away in 2


def test_confusion_is_that_of_the_result_and_names_its_mistakes(finished):
    # Of 10 test images of the first class the student takes the last for the second one.
    text = finished.text().replace(NAMES[0], "A").replace(NAMES[1], "B")
    assert "Most frequent mistakes of round 1 on test" in text
    assert "True class Taken for Images Of its class A B 1 10.0 %" in text


def evaluation_of(confusion):
    names = [f"class {i}" for i in range(len(confusion))]
    report = {"confusion": confusion, "per_class": [{"name": name} for name in names]}
    return Evaluation("round 1", "test", report, is_result=True)


def test_most_confused_pairs_come_first_with_their_share_of_the_true_class():
    found = most_confused(evaluation_of([[5, 0, 3], [1, 9, 0], [3, 0, 0]]))
    assert [(one["truth"][-1], one["predicted"][-1], one["count"]) for one in found] == [
        *(("0", "2", 3), ("2", "0", 3), ("1", "0", 1)),
    ]
    assert [one["share"] for one in found] == [3 / 8, 1.0, 0.1]
    assert most_confused(evaluation_of([[5, 0], [0, 5]])) == []
    assert most_confused(evaluation_of([[0, 1], [1, 0]]), limit=1)[0]["truth"] == "class 0"
    assert most_confused(None) == []


def test_confusion_matrix_has_counts_on_its_cells_while_they_can_be_read():
    figure = confusion_figure(evaluation_of([[50, 7], [0, 1234]]))
    assert figure is not None
    texts = [text for text in (">50<", ">7<", ">1,234<", ">0<") if text in figure]
    assert texts == [">50<", ">7<", ">1,234<"]
    # Three cells, and none for the zero.
    assert figure.count("fill: var(--blue); opacity") == 3
    assert confusion_figure(evaluation_of(np.eye(41, dtype=int).tolist())) is None
    assert confusion_figure(None) is None


def test_reliability_is_drawn_of_the_first_the_last_and_the_baseline(finished):
    report = _report(
        predict(("a", "b"), np.array([0, 1]), np.array([0.9, 0.6]), np.array([0, 0])), NAMES
    )
    labels = [*(f"round {i}" for i in range(9)), "baseline"]
    figure = reliability_figure([Evaluation(label, "dev", report, False) for label in labels])
    assert figure is not None
    assert [i for i in range(9) if f">round {i}, dev<" in figure] == [0, 7, 8]
    assert ">baseline, dev<" in figure
    # One right at 0.9, one wrong at 0.6: the mean distance is (0.1 + 0.6) / 2.
    assert figure.count(">ECE 35.0 %<") == 4


def test_costs_are_device_seconds_and_bytes_of_each_kind_of_stage():
    def cost(kind, *, reused=False, processes=None, seconds: float | None = 2.0, num_bytes=10):
        return StageCost(kind, "a", reused, processes, seconds, num_bytes)

    train, select, total = cost_totals(
        [
            cost("train", processes=4),
            cost("train", reused=True),
            cost("select", seconds=None, num_bytes=5),
        ]
    )
    assert (train.name, train.stages, train.reused) == ("train", 2, 1)
    assert (train.device_seconds, train.reused_device_seconds, train.num_bytes) == (8.0, 2.0, 20)
    assert (select.device_seconds, select.num_bytes, select.num_unknown) == (0, 5, 1)
    assert (total.name, total.stages, total.device_seconds, total.num_bytes) == ("all", 3, 8, 25)


def test_cost_table_adds_up_the_stages_of_the_run(finished):
    # Three trainings of 2 s on two processes, a labelling on three; evaluations, one selection and
    # one promotion on one. 1,500 bytes of predictions, as their labelling says.
    text = finished.text()
    assert "train 3 0 12 s 0.0 s" in text
    assert "label 1 0 6.0 s 0.0 s 1.5 kB" in text
    assert "validate 3 0 6.0 s" in text
    assert "all 12 0 34 s 0.0 s" in text


def test_bytes_of_a_labelling_that_did_not_count_them_are_not_available(tmp_path):
    run = TinyRun(tmp_path)
    one = run.new_round(1)
    run.commit(one, "label")
    one["stages"][0]["state"] = "reused"
    text = run.text()
    assert "label 1 1 0.0 s 2.0 s 0 B" in text
    assert "Of 1 stage time or bytes are not recorded, and are left out." in text


def test_temperature_at_the_end_of_its_range_is_a_warning(tmp_path):
    run = TinyRun(tmp_path)
    one = run.new_round(1)
    run.select(one, temperature=0.05, ece_before=0.1, ece_after=0.0)
    assert "Round 1: the temperature lies at an end of its range" in run.text()
    assert "0.050 0.100, 0.000" in run.text()
    assert "Calibrated confidence of all predictions in 20 bins" in run.text()


def test_a_stage_killed_before_its_provenance_was_written_has_no_time(tmp_path):
    run = TinyRun(tmp_path)
    run.train(run.new_round(0))
    for provenance in tmp_path.rglob("provenance.json"):
        provenance.unlink()
    assert "n/a" in run.text()


def test_predictions_that_were_collected_as_garbage_leave_a_note(tmp_path):
    run = TinyRun(tmp_path).finish()
    for path in run.store.list("predictions"):
        run.store.delete(path)
    assert "the predictions of round 1 are no longer stored" in run.text()
    for path in run.store.list("labelings"):
        run.store.delete(path)
    assert "No gallery" in run.text()


def shard(stem, num_bytes, digest):
    return Shard(stem, digest * 64, 10, num_bytes)


def test_shards_of_the_gallery_are_few_and_within_a_budget():
    many = [shard(f"s{i}", 1000, f"{i:x}") for i in range(16)][::-1]
    assert [s.stem for s in choose_shards(many)] == ["s0", "s1", "s2", "s3"]
    large = [shard("a", MAX_BYTES - 10, "1"), shard("b", 11, "2"), shard("c", 10, "3")]
    assert [s.stem for s in choose_shards(large)] == ["a", "c"]
    huge = [shard("a", MAX_BYTES + 2, "1"), shard("b", MAX_BYTES + 1, "2")]
    assert [s.stem for s in choose_shards(huge)] == ["b"]


def test_small_images_keep_their_pixels_and_large_ones_become_small():
    source, is_tiny = thumbnail(png((8, 8), (1, 2, 3)), where="k")
    assert is_tiny
    head, data = source.split(",")
    assert head == "data:image/png;base64"
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (image.size, image.getpixel((7, 7))) == ((8, 8), (1, 2, 3))
    source, is_tiny = thumbnail(png((600, 300), (1, 2, 3)), where="k")
    assert not is_tiny
    assert source.startswith("data:image/jpeg;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).size == (128, 64)


def test_figures_bear_a_thousand_classes_and_fifty_rounds():
    names = [f"class {i}" for i in range(1000)]
    classes = [{"name": n, "predicted": i, "unique": i, "copies": i} for i, n in enumerate(names)]
    manifest = Manifest("select", "a" * 64, 1, {}, {}, ())
    rounds = [RoundSelection(i, manifest, {"classes": classes}) for i in range(50)]
    figure = class_balance_figure(rounds)
    assert figure is not None
    assert [f">round {i}<" in figure for i in (0, 1, 46, 47, 49)] == [
        True,
        False,
        False,
        True,
        True,
    ]
    curve = [{"step": 1, "loss": 1.0, "labeled_accuracy": None}]
    trainings = [Training(f"round {i}", curve, {}, {}) for i in range(51)]
    figure = curves_figure([*trainings, Training("baseline", curve, {}, {})])
    assert figure is not None
    shown = [i for i in range(51) if f">round {i}<" in figure]
    assert shown == [0, 46, 47, 48, 49, 50]
    assert ">baseline<" in figure


def test_matplotlib_is_imported_only_when_a_figure_is_drawn():
    for path in Path(tasks.report_svg.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text())
        top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        modules = [getattr(node, "module", None) or node.names[0].name for node in top]
        assert not [name for name in modules if name.split(".")[0] == "matplotlib"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0225, "+2.3"), (-0.0225, "−2.3"), (0.0, "0.0"), (-0.0004, "0.0"), (1.0, "+100.0")],
)
def test_points_have_a_sign_and_round_half_away_from_zero(value, text):
    assert formats.points(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.31254, "0.3125"), (999.96, "1000"), (16_480.4, "16,480"), (7.342e-5, "7.342e-05")],
)
def test_large_numbers_are_written_out_and_small_ones_cut(value, text):
    assert formats.brief(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0.04, "0.0 s"), (9.96, "10 s"), (59.6, "1 min 00 s"), (252, "4 min 12 s")),
        *((11100, "3 h 05 min"), (None, "n/a")),
    ],
)
def test_durations_read_as_people_say_them(seconds, text):
    assert formats.duration(seconds).replace("\u202f", " ") == text


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (999, "999 B"), (112640, "112.6 kB"), (2.7e6, "2.7 MB")]
)
def test_sizes_have_decimal_units(num_bytes, text):
    assert formats.size(num_bytes).replace("\u202f", " ") == text


_TEXTS = st.text(st.characters(exclude_categories=("Cs", "Cc", "Co", "Cn")), max_size=12)
_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | _TEXTS
    | st.sampled_from(["no", "On", "null", "1e5", "a: b", "# x", "s3://b/{0..9}.tar", "~"])
)
_CONFIGS = st.recursive(
    _SCALARS,
    lambda below: st.lists(below, max_size=4) | st.dictionaries(_TEXTS, below, max_size=4),
    max_leaves=12,
)


@given(_CONFIGS)
@settings(max_examples=100, deadline=None)
def test_config_as_yaml_reads_back_as_it_was(value):
    assert yaml.safe_load(formats.yaml_text(value)) == value


def test_config_as_yaml_is_what_people_write():
    config = {"name": "demo", "seed": None, "student": {"betas": [0.9, 0.999], "ladder": []}}
    assert formats.yaml_text(config) == (
        "name: demo\nseed: null\nstudent:\n  betas: [0.9, 0.999]\n  ladder: []\n"
    )
