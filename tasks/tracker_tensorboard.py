"""A run's metrics as TensorBoard event files."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks.tracked_metrics import Series


class TensorBoardRun:
    """The event files of one run: a folder for each group, so that curves can be laid over.

    They are only appended to. What they hold already is read from them, so a run that is resumed,
    by this process or another one, goes on where they end.
    """

    def __init__(self, folder: Path) -> None:
        """Take the run's own folder, which need not be there."""
        self._folder = folder
        # group -> name -> last step, once the group's files were read.
        self._last: dict[str, dict[str, int]] = {}

    def write(self, series: Sequence[Series]) -> int:
        """Write the points that the files do not hold yet, and return how many these were.

        Raises: OSError.
        """
        try:
            return sum(
                self._write_group(group, [one for one in series if one.group == group])
                for group in dict.fromkeys(one.group for one in series)
            )
        except BaseException:
            self._last.clear()  # it is not known what was written: the files will tell
            raise

    def _write_group(self, group: str, series: Sequence[Series]) -> int:
        from torch.utils.tensorboard import SummaryWriter

        folder = self._folder / group
        if group not in self._last:
            self._last[group] = last_steps(folder)
        last = self._last[group]
        missing = [(one.name, point) for one in series for point in one.after(last.get(one.name))]
        if not missing:
            return 0
        _wait_for_a_later_name(folder)
        with SummaryWriter(str(folder)) as writer:
            # TensorBoard drops what lies behind a step that comes again, so steps only rise.
            for name, point in sorted(missing, key=lambda pair: pair[1].step):
                writer.add_scalar(name, point.value, point.step, walltime=point.time)
        self._last[group] = last | {name: point.step for name, point in missing}
        return len(missing)


def _wait_for_a_later_name(folder: Path) -> None:
    """Wait, a second at most, until a new file of a folder will come behind those that are there.

    Files are read in the order of their names. These begin with the second they were made in, and
    of one second the tenth comes before the ninth.
    """
    while any(folder.glob(f"events.out.tfevents.{int(time.time()):010d}.*")):
        time.sleep(0.05)


def last_steps(folder: Path) -> dict[str, int]:
    """Return the last step of every scalar in a folder's event files; empty without any.

    A file that was cut off by a kill counts up to its last whole record.
    """
    from tensorboard.backend.event_processing import event_accumulator

    if not folder.is_dir():
        return {}
    every: dict[str, Any] = {event_accumulator.SCALARS: 0}  # 0: keep all of them
    found = event_accumulator.EventAccumulator(str(folder), size_guidance=every)
    found.Reload()
    scalars: list[str] = found.Tags()[event_accumulator.SCALARS]
    return {name: max(event.step for event in found.Scalars(name)) for name in scalars}
