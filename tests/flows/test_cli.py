"""The command line as scripts and people see it: exit codes, JSON on stdout, messages on stderr."""

import io
import json
import re
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image
from prefect.exceptions import TerminationSignal
from typer.testing import CliRunner, Result

from flows.cli import app
from models.description import load_model
from storage.store import open_store
from tasks.classifiers import model_manifest
from tasks.digits import read_digits

OVERRIDES = [
    "rounds=1",
    "baseline=false",
    "data.dev=40",
    "data.test=40",
    "teacher.architecture={kind: small_cnn, width: 4, depth: 1}",
    "student.architecture={kind: small_cnn, width: 4, depth: 1}",
    "teacher.duration.steps=10",
    "student.duration.steps=10",
    "teacher.warmup=null",
    "student.warmup=null",
    # So short a training labels badly; the command line does not mind.
    "selection.threshold.confidence=0.1",
    "selection.allow_collapse=true",
]

FRACTION, TEXT = (float, int), (str,)
INTERVAL: Any = [FRACTION]
STAGE = {
    "kind": TEXT,
    "part": (str, type(None)),
    "fingerprint": TEXT,
    "state": TEXT,
    "seconds": (float, type(None)),
}
ROUND = {
    "round_index": (int,),
    "architecture": TEXT,
    "fingerprint": TEXT,
    "promoted": (bool, type(None)),
    "dev_accuracy": FRACTION,
    "dev_interval": INTERVAL,
    "test_accuracy": FRACTION,
    "test_interval": INTERVAL,
    "seconds": FRACTION,
    "stages": [STAGE],
}
STATUS = {
    "schema": (int,),
    "run": TEXT,
    "state": TEXT,
    "stop_reason": TEXT,
    "stages_computed": (int,),
    "waiting_for": (type(None),),
    "approvals": (list,),
    "store": TEXT,
    "versions_mixed": (bool,),
    "rounds": [ROUND],
    "baseline": (type(None),),
    "model_url": TEXT,
    "report_url": TEXT,
    "tracker_failures": (int,),
}
PLANNED = {
    "kind": TEXT,
    "part": (str, type(None)),
    "round_index": (int,),
    "fingerprint": TEXT,
    "assumed": (bool,),
    "state": TEXT,
    "samples": (int,),
    "teachers": (list, type(None)),
    "shards_done": (int, type(None)),
    "shards": (int, type(None)),
    "estimated_seconds": (float, type(None)),
    "estimated_device_seconds": (float, type(None)),
    "estimated_bytes": (int,),
    "read_bytes": (int,),
    "read_bytes_cached": (int,),
}
TOTALS = {
    "stages": (int,),
    "to_compute": (int,),
    "unmeasured": (int,),
    "estimated_seconds": FRACTION,
    "estimated_device_seconds": FRACTION,
    "estimated_bytes": (int,),
    "read_bytes": (int,),
    "read_bytes_cached": (int,),
}
PLAN = {"schema": (int,), "stages": [PLANNED], "totals": TOTALS}


@dataclass(frozen=True)
class Demo:
    """The demo recipe, run small by the real command with real workers."""

    store: Path
    stdout: str
    stderr: str

    @property
    def status(self) -> Any:
        return json.loads(self.stdout)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, prefect_api: str) -> Demo:
    store = tmp_path_factory.mktemp("cli") / "store"
    command = [sys.executable, "-m", "flows.cli", "run", "demo", "--store", str(store), "--json"]
    finished = subprocess.run(
        [*command, *_sets()], capture_output=True, text=True, timeout=240, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return Demo(store, finished.stdout, finished.stderr)


@pytest.fixture(autouse=True)
def _signal_handlers() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_run_prints_its_status_as_json_and_nothing_else_on_stdout(demo: Demo) -> None:
    status = demo.status

    _assert_shape(status, STATUS)
    assert (status["schema"], status["run"], status["state"]) == (1, "demo", "done")
    assert status["stop_reason"] in ("max_rounds", "no_gain")
    assert status["baseline"] is None
    pseudo = status["rounds"][1]["pseudo_labels"]
    reported = {"kept", "unique", "precision", "coverage", "leaked", "out_of_domain"}
    assert pseudo.keys() == reported
    assert status["report_url"] == f"{demo.store}/runs/demo/report.html"
    assert "round 0 · teacher: 10/10 steps" in demo.stderr
    assert "Prefect UI while it runs: http://127.0.0.1" in demo.stderr


def test_progress_in_a_log_is_a_line_each(demo: Demo) -> None:
    lines = [line for line in demo.stderr.splitlines() if "images_per_second" in line]
    assert lines
    assert all(re.fullmatch(r".+: \d+/\d+ \w+ .*images_per_second [\d.,]+", one) for one in lines)


def test_status_and_list_say_what_run_said(demo: Demo) -> None:
    assert json.loads(_invoke("status", "demo", demo, "--json").stdout) == demo.status
    listed = json.loads(_invoke("list", demo, "--json").stdout)
    assert listed == {"schema": 1, "store": str(demo.store), "runs": [demo.status]}
    table = _invoke("status", "demo", demo).stdout
    assert "small_cnn-4x1" in table
    assert demo.status["model_url"] in table, "paths are not folded"
    assert "demo" in _invoke("list", demo).stdout


def test_a_store_without_runs_says_so(tmp_path: Path) -> None:
    store = f"--store={tmp_path}/mistyped"
    assert _invoke("list", store).stdout == f"no runs in {tmp_path}/mistyped\n"
    assert json.loads(_invoke("list", store, "--json").stdout)["runs"] == []


def test_resume_of_a_finished_run_recomputes_nothing_whatever_its_launch(demo: Demo) -> None:
    resumed = _invoke("resume", "demo", demo, "--json", "--set=launch.processes=auto")

    status = json.loads(resumed.stdout)
    assert status["model_url"] == demo.status["model_url"]
    assert {s["state"] for one in status["rounds"] for s in one["stages"]} == {"reused"}


def test_resume_changes_nothing_that_results_depend_on(demo: Demo) -> None:
    refused = _invoke("resume", "demo", demo, "--set=rounds=3", expect=2)
    assert (
        "only device, cache, loader_threads, materialize, launch, engine, trackers may change"
        in refused.stderr
    )


def test_plan_shows_what_is_there_and_what_a_longer_run_would_cost(demo: Demo) -> None:
    same = json.loads(_invoke("plan", "demo", demo, "--json", *_sets()).stdout)
    longer = json.loads(
        _invoke("plan", "demo", demo, "--json", *_sets(), "--set=rounds=2", "--name=longer").stdout
    )

    _assert_shape(same, PLAN)
    assert [stage["kind"] for stage in same["stages"]] == [
        *["train", "validate", "test"],
        *["label", "select", "train", "validate", "test", "promote"],
    ]
    assert {stage["state"] for stage in same["stages"]} == {"reused"}
    new = longer["stages"][9:]
    assert [stage["kind"] for stage in new][:3] == ["label", "select", "train"]
    # The student of round 1 was promoted: round 2 is no assumption.
    assert demo.status["rounds"][1]["promoted"] is True
    assert {(stage["state"], stage["assumed"]) for stage in new} == {("to_do", False)}
    assert (new[0]["shards_done"], new[0]["shards"]) == (0, same["stages"][3]["shards"])
    totals = longer["totals"]
    assert same["totals"]["to_compute"] == same["totals"]["estimated_bytes"] == 0
    # Round 2 is like round 1, all of whose stages have told their times.
    assert (totals["stages"], totals["to_compute"], totals["unmeasured"]) == (15, 6, 0)
    assert totals["estimated_seconds"] == pytest.approx(
        sum(stage["estimated_seconds"] for stage in new)
    )
    assert 0 < totals["estimated_seconds"] <= totals["estimated_device_seconds"]
    assert totals["estimated_bytes"] == sum(stage["estimated_bytes"] for stage in new)
    assert all(stage["estimated_bytes"] > 0 for stage in new if stage["kind"] != "promote")
    shown = _invoke("plan", "demo", demo, *_sets("rounds=3"), "--name=longer").stdout
    assert "to do ?" in shown
    assert "12 to compute: " in shown
    assert "device-hours" in shown
    assert "longer" not in _invoke("list", demo).stdout


def test_plan_of_a_changed_config_under_a_used_name_is_refused_as_the_run_would_be(
    demo: Demo,
) -> None:
    for command in ("plan", "run"):
        refused = _invoke(command, "demo", demo, *_sets("rounds=2"), expect=2)
        assert "rounds is 1 there, 2 asked for" in refused.stderr
        assert "Choose another --name" in refused.stderr


def test_failing_run_exits_1_with_one_message_and_no_traceback(demo: Demo) -> None:
    failed = _invoke(
        *("run", "demo", demo, "--json", "--name=strict"),
        *_sets("selection.threshold.confidence=1"),
        expect=1,
    )

    assert failed.stdout == ""
    assert "error: the selection keeps none of" in failed.stderr
    assert "selection.threshold.confidence" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert "failed; `selftrain resume strict` goes on" in _invoke("status", "strict", demo).stdout


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), TerminationSignal(signal.SIGTERM)])
def test_stopped_run_exits_3_and_tells_how_to_go_on(
    demo: Demo, monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise stop

    monkeypatch.setattr("flows.running.self_training", stopped)

    result = _invoke("run", "demo", demo, *_sets(), expect=3)

    assert f"go on with: selftrain resume demo --store {demo.store}" in result.stderr


@pytest.mark.parametrize(
    ("command", "flow"),
    [
        (["run"], "flows.running.self_training"),
        (["serve", "--cron=0 2 * * *"], "flows.serving.serve_on_schedule"),
        (["deploy"], "flows.deploying.deploy"),
    ],
)
def test_store_with_credentials_is_refused_before_prefect_sees_it(
    command: list[str], flow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seen(*_: object, **__: object) -> None:
        raise AssertionError("the URL became a parameter")

    monkeypatch.setattr(flow, seen)

    name, *options = command
    refused = _invoke(name, "demo", *options, "--store=s3://key:hidden-word@bucket", expect=1)

    assert "s3://...: credentials do not belong in a URL" in refused.stderr
    assert "hidden-word" not in refused.stderr


def test_unknown_run_exits_2_and_lists_the_known_ones(demo: Demo) -> None:
    for command in (["status"], ["resume"], ["report"], ["export", "out"], ["predict", "x.png"]):
        refused = _invoke(command[0], "nightly", *command[1:], demo, expect=2)
        assert "there is no run 'nightly' in" in refused.stderr
        assert "known runs: demo" in refused.stderr


def test_wrong_configs_exit_2_and_name_key_value_and_known_ones(tmp_path: Path) -> None:
    store = f"--store={tmp_path}"
    unknown_key = _invoke("plan", "demo", store, "--set=teacher.learning_rate=1", expect=2)
    assert "teacher.learning_rate = 1: unknown key; known here:" in unknown_key.stderr
    assert "optimizer" in unknown_key.stderr
    out_of_bounds = _invoke("run", "demo", store, "--set", "rounds=-1", expect=2)
    assert "rounds = -1" in out_of_bounds.stderr
    no_recipe = _invoke("config", "imagenette", expect=2)
    assert "neither a file nor a recipe. Recipes:" in no_recipe.stderr
    assert "demo" in no_recipe.stderr


def test_missing_store_exits_2_and_names_the_three_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SELFTRAIN_STORE", raising=False)
    refused = _invoke("status", "demo", expect=2)
    for way in ("--store", "SELFTRAIN_STORE"):
        assert way in refused.stderr


def test_store_may_come_from_the_environment(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELFTRAIN_STORE", str(demo.store))
    assert json.loads(_invoke("status", "demo", "--json").stdout)["run"] == "demo"


def test_help_of_every_command_has_an_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    commands = _commands()
    assert len(commands) >= 14
    for command in commands:
        assert "Example" in _invoke(*command, "--help").stdout, command


def test_help_swallows_nothing_that_looks_like_a_tag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert "as <type>/<name>: slack-webhook/ops" in _invoke("deploy", "--help").stdout


def test_help_imports_nothing_heavy() -> None:
    """A fresh interpreter; the time itself depends on the machine."""
    script = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from flows.cli import app\n"
        "for command in (['--help'], ['run', '--help'], ['data', 'shard', '--help']):\n"
        "    assert CliRunner().invoke(app, command).exit_code == 0\n"
        "print(sorted({'torch', 'prefect', 'numpy', 'pyarrow', 'fsspec'} & sys.modules.keys()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"


def test_config_prints_what_run_reads(tmp_path: Path) -> None:
    printed = _invoke("config", "demo", "--set=rounds=2").stdout
    file = tmp_path / "mine.yaml"
    file.write_text(printed)

    assert "rounds: 2\n" in printed
    assert _invoke("config", str(file)).stdout == printed
    assert "demo" in _invoke("recipes").stdout


def test_predict_names_the_digits(demo: Demo, tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    folder.mkdir()
    for number, image in enumerate(read_digits()[:3]):
        (folder / f"{number}.png").write_bytes(image.load())
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")

    printed = _invoke("predict", "demo", str(folder), str(broken), demo, "--json", "--device=cpu")

    answer = json.loads(printed.stdout)
    assert answer.keys() == {"schema", "run", "model", "predictions"}
    assert [Path(p["path"]).name for p in answer["predictions"]] == [
        *["0.png", "1.png", "2.png"],
        "broken.jpg",
    ]
    for one in answer["predictions"][:3]:
        assert one["label"] == one["top"][0]["label"]
        assert one["label"] in [str(digit) for digit in range(10)]
        assert 0.1 <= one["confidence"] <= 1
    assert "broken.jpg" in answer["predictions"][3]["error"]
    assert "not readable" in _invoke("predict", "demo", str(broken), demo).stdout


def test_exported_model_loads_in_three_lines_and_comes_back_by_import(
    demo: Demo, tmp_path: Path
) -> None:
    out = tmp_path / "model"
    assert _invoke("export", "demo", str(out), demo).stdout == f"{out}\n"

    model = load_model(out)
    images = np.zeros((2, 16, 16, 3), np.uint8)
    labels = model.predict(images)

    assert len(labels) == 2
    assert set(labels) <= {str(digit) for digit in range(10)}
    refused = _invoke("export", "demo", str(out), demo, expect=1)
    assert str(out) in refused.stderr, "nothing is overwritten"

    classes = tmp_path / "classes.txt"
    classes.write_text("\n".join(model.class_names) + "\n")
    imported = _invoke(
        "import",
        str(out / "model.safetensors"),
        "--architecture={kind: small_cnn, width: 4, depth: 1}",
        f"--classes={classes}",
        "--image-size=16",
        "--mean=0.5,0.5,0.5",
        "--std=0.5,0.5,0.5",
        demo,
    )
    url = imported.stdout.strip()
    assert url.startswith(f"{demo.store}/models/")
    theirs = model_manifest(open_store(str(demo.store)), url.rpartition("/")[2])
    ours = model_manifest(open_store(str(demo.store)), demo.status["model_url"].rpartition("/")[2])
    assert theirs.object("model").sha256 == ours.object("model").sha256


def test_report_is_rebuilt_and_its_place_printed(demo: Demo) -> None:
    report = demo.store / "runs" / "demo" / "report.html"
    report.unlink()

    assert _invoke("report", "demo", demo).stdout == f"{report}\n"
    assert report.stat().st_size > 1000


def test_data_shard_and_index_make_corpora_of_a_folder(tmp_path: Path, lab: Any) -> None:
    photos = tmp_path / "photos"
    for label, name in enumerate(["red", "green", "blue"]):
        (photos / name).mkdir(parents=True)
        for number in range(10):
            (photos / name / f"{number}.png").write_bytes(lab.png(label, number))
    out = tmp_path / "shards"
    counts = ("--labels-per-class=2", "--dev=6", "--test=6", "--shard-size=5")

    printed = _invoke("data", "shard", str(photos), str(out), *counts, "--json")

    summary = json.loads(printed.stdout)
    assert summary["schema"] == 1
    assert sorted(summary["class_names"]) == ["blue", "green", "red"]
    samples = {name: split["samples"] for name, split in summary["splits"].items()}
    assert samples == {"labeled": 6, "dev": 6, "test": 6, "unlabeled": 12}
    indexed = _invoke("data", "index", str(out / "unlabeled"), "--json", f"--store={tmp_path}/s")
    facts = json.loads(indexed.stdout)
    assert (facts["schema"], facts["shards"], facts["samples"]) == (1, 3, 12)
    assert (tmp_path / "s" / "corpora" / f"{facts['corpus']}.json").is_file()
    again = json.loads(_invoke("data", "index", str(out / "unlabeled"), "--json").stdout)
    assert again["corpus"] == facts["corpus"]
    plain = _invoke("data", "index", str(out / "dev")).stdout
    assert "2 shards, 6 samples" in plain


def test_data_cifar10_keeps_the_archives_test_split(tmp_path: Path) -> None:
    archive = tmp_path / "cifar.tar"
    with tarfile.open(archive, "w") as tar:
        for split, count in (("train", 6), ("test", 2)):
            for label, name in enumerate(["cat", "dog"]):
                for number in range(count):
                    data = _image(10 * label + len(split), number)
                    info = tarfile.TarInfo(f"{split}/{name}/{number}.png")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))

    printed = _invoke(
        *("data", "cifar10", str(archive), str(tmp_path / "out")),
        *("--labels-per-class=2", "--dev=4", "--shard-size=3", "--json"),
    )

    splits = json.loads(printed.stdout)["splits"]
    assert {name: split["samples"] for name, split in splits.items()} == {
        "labeled": 4,
        "dev": 4,
        "test": 4,
        "unlabeled": 4,
    }
    assert splits["test"]["classes"] == {"cat": 2, "dog": 2}


def _invoke(*arguments: "str | Demo", expect: int = 0) -> Result:
    """Run a command in this process; a Demo stands for its --store."""
    texts = [f"--store={a.store}" if isinstance(a, Demo) else a for a in arguments]
    result = CliRunner().invoke(app, texts)
    assert result.exit_code == expect, (result.output, result.exception)
    return result


def _sets(*more: str) -> list[str]:
    return [part for override in (*OVERRIDES, *more) for part in ("--set", override)]


def _assert_shape(value: Any, shape: Any, where: str = "answer") -> None:
    """Every documented key is there and of its type; more keys are no break of the interface."""
    if isinstance(shape, dict):
        assert shape.keys() <= value.keys(), where
        for key in shape:
            _assert_shape(value[key], shape[key], f"{where}.{key}")
    elif isinstance(shape, list):
        assert isinstance(value, list), where
        assert value, where
        for number, one in enumerate(value):
            _assert_shape(one, shape[0], f"{where}[{number}]")
    else:
        assert isinstance(value, shape), f"{where} is {value!r}"


def _commands() -> list[list[str]]:
    def below(command: Any, path: list[str]) -> list[list[str]]:
        children = getattr(command, "commands", None)
        if children is None:
            return [path]
        return [leaf for name in children for leaf in below(children[name], [*path, name])]

    return below(typer.main.get_command(app), [])


def _image(level: int, number: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng([level, number]).integers(0, 256, (8, 8, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()
