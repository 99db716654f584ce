"""`selftrain init`: what it makes of a user's data, and that what it writes runs."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from flows.cli import app
from flows.first_choices import choose_network
from flows.first_config import write_first_config
from flows.first_look import FirstLook
from flows.initializing import run_name
from flows.loading import load_config
from flows.machine import Machine
from storage.corpus import Corpus, Shard
from storage.samples import iterate_samples
from tasks.image_sizes import ImageSizes
from tasks.rates import Rates

CPU_MACHINE = Machine(gpus=0, cores=2, has_bf16=True)


@pytest.fixture(autouse=True)
def _known_rates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        "flows.first_choices.measure_rates", lambda *_, **__: Rates(training=100.0, labeling=400.0)
    )
    monkeypatch.setattr("flows.initializing.this_machine", lambda: CPU_MACHINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SELFTRAIN_STORE", raising=False)


@pytest.fixture
def write_images(tmp_path: Path, lab: Any) -> Callable[..., Path]:
    """Return a writer of images; `label`s of 0 to 2, each image another one."""
    written = 0

    def write(folder: str, count: int, *, label: int = 0) -> Path:
        nonlocal written
        path = tmp_path / folder
        path.mkdir(parents=True, exist_ok=True)
        for _ in range(count):
            (path / f"{written:04d}.png").write_bytes(lab.png(label, written))
            written += 1
        return path

    return write


def test_images_become_shards_and_a_config_that_plan_accepts_unchanged(
    tmp_path: Path, write_images: Callable[..., Path]
) -> None:
    for label, name in enumerate(("red", "green", "blue")):
        write_images(f"photos/{name}", 10, label=label)
    write_images("photos", 12)

    facts = _init("photos")

    assert facts["schema"] == 1
    assert facts["config"] == "mine.yaml"
    # 30 labels: a fifth for dev; too few for a test split.
    samples = {name: split["samples"] for name, split in facts["splits"].items()}
    assert samples == {"labeled": 24, "dev": 6, "unlabeled": 12}
    assert facts["class_names"] == ["blue", "green", "red"]
    assert sum(facts["label_counts"].values()) == 24
    assert (facts["images"]["median"], facts["images"]["unreadable"]) == (8, 0)
    assert any("the dev split has 6 images" in warning for warning in facts["warnings"])
    assert any("no test split" in warning for warning in facts["warnings"])
    # 300 steps of 16 labels at 100 images/s; a student reads four times as many.
    assert facts["estimated_seconds"]["teacher"] == pytest.approx(48)
    assert facts["estimated_seconds"]["student"] == pytest.approx(192)
    assert facts["estimated_seconds"]["label"] == pytest.approx(12 / 400)
    assert facts["estimated_seconds"]["all"] == pytest.approx(48 + 3 * (192 + 0.03) + 192)

    text = (tmp_path / "mine.yaml").read_text()
    printed = _invoke("config", "mine.yaml").stdout
    assert "rounds: 3\n" in printed
    planned = json.loads(_invoke("plan", "mine.yaml", "--json").stdout)
    assert {stage["state"] for stage in planned["stages"]} == {"to_do"}
    assert (tmp_path / "mine.yaml").read_text() == text
    assert "drawn with seed 0" in text


def test_every_choice_has_a_comment_that_says_why(write_images: Callable[..., Path]) -> None:
    write_images("photos/a", 10)
    write_images("photos/b", 10, label=1)
    write_images("photos", 5)

    choices = _init("photos")["choices"]

    lines = Path("mine.yaml").read_text().splitlines()
    is_comment = [line.lstrip().startswith("#") for line in lines]
    uncommented = {
        line
        for number, line in enumerate(lines)
        if not is_comment[number] and not is_comment[number - 1]
    }
    assert uncommented == {"  <<: *network"}
    chosen = {"architecture", "image_size", "batch_size", "precision", "duration", "noise"}
    assert {f"teacher.{key}" for key in chosen} <= choices.keys()
    assert {"selection.threshold", "cache", "launch", "engine", "rounds"} <= choices.keys()
    assert all(choice["why"] for choice in choices.values())


def test_nothing_is_touched_where_the_config_is_there_unless_forced(
    tmp_path: Path, write_images: Callable[..., Path]
) -> None:
    write_images("photos/a", 10)
    write_images("photos/b", 10, label=1)
    write_images("photos", 5)
    Path("mine.yaml").write_text("mine\n")

    refused = _invoke("init", "photos", expect=2)

    assert "mine.yaml is there already" in refused.stderr
    assert Path("mine.yaml").read_text() == "mine\n"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "store") == [
        "mine.yaml",
        "photos",
    ]
    _init("photos", "--force")
    assert Path("mine.yaml").read_text().startswith("# Written by `selftrain init`.")


def test_labels_alone_are_refused_with_three_ways_out_and_may_be_held_back(
    write_images: Callable[..., Path],
) -> None:
    for label, name in enumerate(("red", "green", "blue")):
        write_images(f"photos/{name}", 20, label=label)

    refused = _invoke("init", "photos", expect=2).stderr
    assert "all 60 images have a label" in refused
    for way in ("directly into the folder", "--labels", "--labels-per-class 4"):
        assert way in refused
    assert not Path("mine-shards").exists()

    samples = {
        name: split["samples"]
        for name, split in _init("photos", "--labels-per-class=4")["splits"].items()
    }
    # Of the 16 left of each class a fifth, 3, goes to dev and as many to test.
    assert samples == {"labeled": 12, "dev": 9, "test": 9, "unlabeled": 30}


def test_images_of_a_table_of_labels_are_not_in_the_corpus_as_well(
    write_images: Callable[..., Path],
) -> None:
    folder = write_images("photos", 30)
    names = sorted(path.name for path in folder.iterdir())
    with Path("labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label"])
        writer.writerows([f"photos/{name}", "ab"[i % 2]] for i, name in enumerate(names[:12]))

    facts = _init("photos", "--labels=labels.csv")

    samples = {name: split["samples"] for name, split in facts["splits"].items()}
    assert samples == {"labeled": 10, "dev": 2, "unlabeled": 18}
    images = [bytes(s.image) for tar in Path("mine-shards").rglob("*.tar") for s in _samples(tar)]
    assert len(images) == len(set(images)) == 30


def test_a_tree_of_splits_keeps_its_test_images(write_images: Callable[..., Path]) -> None:
    for label, name in enumerate(("a", "b")):
        write_images(f"data/train/{name}", 10, label=label)
        write_images(f"data/test/{name}", 3, label=label)
    write_images("data/unlabeled/found", 7)

    facts = _init("data")

    samples = {name: split["samples"] for name, split in facts["splits"].items()}
    assert samples == {"labeled": 16, "dev": 4, "test": 6, "unlabeled": 7}
    assert facts["class_names"] == ["a", "b"]


def test_a_class_with_two_labels_has_one_to_train_on(write_images: Callable[..., Path]) -> None:
    write_images("photos/often", 40)
    write_images("photos/rare", 2, label=1)
    write_images("photos", 5)

    facts = _init("photos")

    assert facts["label_counts"]["rare"] >= 1
    assert any("imbalanced" in warning for warning in facts["warnings"])


def test_shards_as_data_shard_writes_them_need_no_word(lab: Any, corpora_folder: Path) -> None:
    facts = _init(str(corpora_folder))

    assert {name: split["pattern"] for name, split in facts["splits"].items()} == {
        name: name for name in ("labeled", "dev", "test", "unlabeled")
    }
    assert facts["choices"]["data.root"]["value"] == str(corpora_folder)
    assert facts["made_by"] is None


def test_dev_is_taken_from_labelled_shards_where_none_is_named(
    tmp_path: Path, lab: Any, corpora_folder: Path
) -> None:
    labeled = [(f"k{i}", lab.png(i % 3, 500 + i), i % 3) for i in range(18)]
    shards = {f"l-{n}": labeled[3 * n : 3 * n + 3] for n in range(6)}
    lab.write_split(tmp_path / "labels", shards)
    unlabeled = str(corpora_folder / "unlabeled")

    facts = _init(unlabeled, "--labels=labels")

    # Every fifth of six shards of three.
    assert facts["splits"]["dev"]["samples"] == 6
    assert facts["splits"]["labeled"]["samples"] == 12
    assert facts["splits"]["unlabeled"]["pattern"] == unlabeled
    assert {p.name for p in tmp_path.glob("mine-shards/*")} == {"labeled.txt", "dev.txt"}


def test_what_is_not_there_is_said_to_be_missing(write_images: Callable[..., Path]) -> None:
    write_images("photos", 3)
    assert "foto: there is no such" in _invoke("init", "foto", expect=2).stderr
    assert "l.csv: there is no such" in _invoke("init", "photos", "--labels=l.csv", expect=2).stderr


def test_labelled_shards_that_cannot_be_split_are_refused(
    tmp_path: Path, lab: Any, corpora_folder: Path
) -> None:
    one_class_each = {
        f"l-{label}": [(f"k{i}", lab.png(label, 700 + 10 * label + i), label) for i in range(3)]
        for label in range(3)
    }
    lab.write_split(tmp_path / "sorted", one_class_each)
    unlabeled = str(corpora_folder / "unlabeled")

    assert "--dev" in _invoke("init", unlabeled, "--labels=sorted", expect=2).stderr
    assert "Say which images have labels" in _invoke("init", unlabeled, expect=2).stderr
    with_dev = _init(unlabeled, "--labels=sorted", f"--dev={corpora_folder / 'dev'}")
    assert any("data.labeled" in w and "sorted by class" in w for w in with_dev["warnings"])


def test_interrupted_while_it_makes_shards_it_leaves_no_config_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, write_images: Callable[..., Path]
) -> None:
    for label, name in enumerate(("a", "b")):
        write_images(f"photos/{name}", 10, label=label)
    write_images("photos", 9)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tasks.sharding._pattern", interrupted)  # after the first split's shards
        assert "stopped" in _invoke("init", "photos", expect=3).stderr
    assert not Path("mine.yaml").exists()
    written = {path: path.stat().st_mtime_ns for path in Path("mine-shards").rglob("*.tar")}
    assert written

    _init("photos")
    assert {path: path.stat().st_mtime_ns for path in written} == written


@pytest.mark.parametrize("gpus", [0, 1, 3, 8])
@pytest.mark.parametrize("median", [8, 28, 100, 500])
def test_what_is_chosen_is_a_config_whatever_the_machine_and_the_images(
    gpus: int, median: int, tmp_path: Path
) -> None:
    machine = Machine(gpus=gpus, cores=16, has_bf16=gpus > 0)
    for labels, num_classes, unlabeled in ((2, 2, 5), (90, 9, 10**5), (10**6, 1000, 10**8)):
        look = _look(labels=labels, num_classes=num_classes, unlabeled=unlabeled, median=median)
        text = write_first_config(
            look, machine, choose_network(look, machine), Rates(10, 30), name="mine", store="store"
        ).text
        path = tmp_path / "config.yaml"
        path.write_text(text)
        config = load_config(str(path), overrides=[f"launch.processes={max(1, gpus)}"])
        assert config.student is not None
        assert config.student.batch_size <= max(labels, 2 * max(1, gpus))
        assert config.launch.kind == "local"
        assert max(len(line) for line in text.splitlines() if "#" in line) <= 100


@pytest.mark.parametrize(
    ("gpus", "median", "size", "kind", "reason"),
    [
        (0, 8, 16, "small_cnn", "16 is the least"),
        (0, 30, 32, "small_cnn", "more would only enlarge"),
        (0, 500, 64, "small_cnn", "64 at most"),
        (1, 48, 48, "wide_resnet", "more would only enlarge"),
        (1, 100, 128, "resnet", "usual size"),
        (1, 500, 224, "resnet", "usual size"),
    ],
)
def test_size_and_network_follow_images_and_device(
    gpus: int, median: int, size: int, kind: str, reason: str
) -> None:
    look = _look(labels=100, num_classes=2, unlabeled=900, median=median)

    network = choose_network(look, Machine(gpus=gpus, cores=2, has_bf16=True))

    assert (network.image_size, network.architecture["kind"]) == (size, kind)
    assert reason in network.why[1]


def test_a_threshold_lies_above_chance() -> None:
    chosen: dict[int, float] = {}
    for num_classes in (2, 4, 9, 10, 1000):
        look = _look(labels=2000, num_classes=num_classes, unlabeled=9000, median=32)
        choices = _config(look).choices
        chosen[num_classes] = choices["selection.threshold"][0]["confidence"]
    # (1 + 1/2) / 2, (1 + 1/4) / 2, (1 + 1/9) / 2; the paper's for many classes.
    assert chosen == {2: 0.75, 4: 0.62, 9: 0.56, 10: 0.3, 1000: 0.3}


def test_a_cache_is_chosen_for_remote_shards_that_the_disk_has_room_for() -> None:
    def chosen(root: str, num_bytes: int, free: int) -> Any:
        look = _look(
            labels=100, num_classes=2, unlabeled=1000, median=32, root=root, num_bytes=num_bytes
        )
        return _config(look, cache_free_bytes=free, cache_dir="/scratch").choices["cache"][0]

    gib = 2**30
    # Two corpora of 10 GiB each and a tenth more.
    assert chosen("s3://bucket", 10 * gib, 100 * gib) == {
        "dir": "/scratch",
        "max_bytes": 22 * gib,
    }
    assert chosen("s3://bucket", 10 * gib, 20 * gib) is None
    assert chosen("s3://bucket", gib, 100 * gib) is None, "both stay in memory"
    assert chosen("/data", 10 * gib, 100 * gib) is None, "the disk is this machine's"


def test_unreadable_images_raise_what_a_shard_may_hold() -> None:
    look = _look(labels=100, num_classes=2, unlabeled=1000, median=32, unreadable=5)
    # Twice 5 of 50 of a shard of 1000.
    assert _config(look).choices["max_bad_samples"][0] == 200
    look = _look(labels=100, num_classes=2, unlabeled=1000, median=32)
    assert _config(look).choices["max_bad_samples"][0] == 0


def test_files_names_become_names_of_runs() -> None:
    assert run_name("My photos_2") == "my-photos-2"
    assert run_name("Ä") == "mine"


def _look(
    *,
    labels: int,
    num_classes: int,
    unlabeled: int,
    median: int,
    root: str = "/data",
    num_bytes: int = 1000,
    unreadable: int = 0,
) -> FirstLook:
    names = [f"class {i}" for i in range(num_classes)]

    def corpus(number: int, samples: int, counts: dict[int, int] | None) -> Corpus:
        shard = Shard(f"shard-{number}", f"{number:064x}", samples, num_bytes, counts)
        return Corpus.of([shard], names)

    each = labels // num_classes
    return FirstLook(
        root=root,
        patterns={split: split for split in ("labeled", "dev", "unlabeled")},
        corpora={
            "labeled": corpus(1, labels, dict.fromkeys(range(num_classes), each)),
            "dev": corpus(2, 60, {0: 60}),
            "unlabeled": corpus(3, unlabeled, None),
        },
        sizes=ImageSizes(50, unreadable, 1000, median, median, median),
        made_by=None,
        warnings=(),
    )


def _config(look: FirstLook, **room: Any) -> Any:
    network = choose_network(look, CPU_MACHINE)
    return write_first_config(
        look, CPU_MACHINE, network, Rates(10, 30), name="mine", store="store", **room
    )


def _samples(tar: Path) -> Any:
    return iterate_samples(tar.read_bytes(), stem=tar.stem)


def _init(*arguments: str) -> dict[str, Any]:
    return json.loads(_invoke("init", *arguments, "--store=store", "--json").stdout)


def _invoke(*arguments: str, expect: int = 0) -> Result:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == expect, (result.output, result.exception)
    return result
