"""Event files: what is in them, and that nothing is written to them twice."""

from pathlib import Path

import pytest

from tasks.tracked_metrics import Point, Series
from tasks.tracker_tensorboard import TensorBoardRun, last_steps

event_accumulator = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator",
    reason="the extra selftrain[tensorboard] is not installed",
)


def series(name: str, values: dict[int, float], *, group: str = "round-1") -> Series:
    points = tuple(Point(step, value, 1e9 + step) for step, value in values.items())
    return Series(group, name, points)


def scalars(folder: Path, name: str) -> list[tuple[int, float, float]]:
    """Step, value and time of every record of a scalar, in the order of the files."""
    found = event_accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return [(one.step, one.value, one.wall_time) for one in found.Scalars(name)]


LOSS = series("training/loss", {10: 1.5, 20: 0.75, 30: 0.5})
ACCURACY = series("training/labeled_accuracy", {20: 0.25})
ROUNDS = series("dev/accuracy", {0: 0.5, 1: 0.625}, group="rounds")


def test_every_group_has_a_folder_with_steps_values_and_times(tmp_path: Path) -> None:
    assert TensorBoardRun(tmp_path / "run").write([LOSS, ACCURACY, ROUNDS]) == 6
    assert scalars(tmp_path / "run" / "round-1", "training/loss") == [
        (10, 1.5, 1e9 + 10),
        (20, 0.75, 1e9 + 20),
        (30, 0.5, 1e9 + 30),
    ]
    assert scalars(tmp_path / "run" / "round-1", "training/labeled_accuracy") == [
        (20, 0.25, 1e9 + 20)
    ]
    assert [one[:2] for one in scalars(tmp_path / "run" / "rounds", "dev/accuracy")] == [
        *((0, 0.5), (1, 0.625)),
    ]


def test_more_than_a_reservoir_of_points_is_kept(tmp_path: Path) -> None:
    many = series("training/loss", {step: float(step) for step in range(25_000)})
    TensorBoardRun(tmp_path).write([many])
    assert last_steps(tmp_path / "round-1") == {"training/loss": 24_999}
    assert len(scalars(tmp_path / "round-1", "training/loss")) == 25_000


def test_written_again_by_this_process_or_the_next_nothing_is_added(tmp_path: Path) -> None:
    first = TensorBoardRun(tmp_path)
    first.write([LOSS])
    files = sorted(tmp_path.rglob("*"))
    assert first.write([LOSS]) == 0
    assert TensorBoardRun(tmp_path).write([LOSS]) == 0
    assert sorted(tmp_path.rglob("*")) == files


def test_files_of_a_group_are_named_in_the_order_of_their_steps(tmp_path: Path) -> None:
    writer = TensorBoardRun(tmp_path)
    for last in (10, 20):
        writer.write([series("training/loss", {last: 1.0})])
    # Names go on with the process and a number as text, by which the tenth is before the ninth.
    seconds = [int(path.name.split(".")[3]) for path in sorted((tmp_path / "round-1").iterdir())]
    assert len(set(seconds)) == 2
    assert [one[0] for one in scalars(tmp_path / "round-1", "training/loss")] == [10, 20]


@pytest.mark.parametrize("is_resumed", [False, True])
def test_only_what_lies_behind_the_last_step_is_added(tmp_path: Path, is_resumed: bool) -> None:
    writer = TensorBoardRun(tmp_path)
    writer.write([series("training/loss", {10: 1.5, 20: 0.75})])
    if is_resumed:
        writer = TensorBoardRun(tmp_path)
    assert writer.write([LOSS, ACCURACY]) == 2
    assert [one[:2] for one in scalars(tmp_path / "round-1", "training/loss")] == [
        *((10, 1.5), (20, 0.75), (30, 0.5)),
    ]


def test_a_file_that_a_kill_cut_off_is_taken_up_at_its_last_whole_record(tmp_path: Path) -> None:
    TensorBoardRun(tmp_path).write([LOSS])
    (file,) = (tmp_path / "round-1").iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    assert last_steps(tmp_path / "round-1") == {"training/loss": 20}
    assert TensorBoardRun(tmp_path).write([LOSS]) == 1
    assert [one[0] for one in scalars(tmp_path / "round-1", "training/loss")] == [10, 20, 30]


def test_after_a_failure_the_files_are_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = TensorBoardRun(tmp_path)
    with monkeypatch.context() as patch:

        def fail(*_: object, **__: object) -> None:
            raise OSError("disk full")

        patch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", fail)
        with pytest.raises(OSError, match="disk full"):
            writer.write([LOSS])
    assert writer.write([LOSS]) == 3


def test_a_folder_that_is_not_there_holds_no_steps(tmp_path: Path) -> None:
    assert last_steps(tmp_path / "none") == {}
