"""How shards are cut into the groups of tasks: by the work in them, not by their number."""

from collections.abc import Sequence
from typing import Literal

from storage.corpus import Shard
from tasks.devices import DeviceType

MAX_GROUPS = 100

_IMAGES_PER_GROUP = {"cpu": 20_000, "cuda": 250_000}
"""Minutes at the hundreds of images that a core labels a second, and at the thousands of a GPU. At
the end of a group a GPU waits for the next one's first images, half a second."""
# With so many a worker they can shrink all the way, the first half of the work being handed out in
# the first round.
_GROUPS_PER_WORKER = 4
# To read and decode so many bytes costs about as much as the forward pass of a small network: 1 ms
# of a core (MobileNetV3-small at 224 px).
_BYTES_PER_IMAGE = 100_000


def work_of(shards: Sequence[Shard]) -> float:
    """Return the cost of labelling, in images of which half is decoding and half the network."""
    return sum(_work(shard) for shard in shards)


def group_shards(
    shards: Sequence[Shard],
    shards_per_task: int | Literal["auto"],
    *,
    num_workers: int,
    device: DeviceType = "cpu",
) -> list[list[Shard]]:
    """Cut the shards into groups, in order.

    Args:
        shards: in the corpus's order.
        shards_per_task: a number of shards; auto: minutes of work each where there is so much, a
            few groups for each worker but at most 100 (or one for each of more workers). For
            several workers they shrink evenly from twice the mean to little, so that none waits
            long for another's last group.
        num_workers: how many groups are labelled at a time.
        device: that each worker computes on.
    Source: Tzen and Ni 1993, trapezoid self-scheduling.
    """
    if shards_per_task != "auto":
        size = shards_per_task
        return [list(shards[start : start + size]) for start in range(0, len(shards), size)]
    wanted = max(-(-work_of(shards) // _IMAGES_PER_GROUP[device]), _few_for_each(num_workers))
    num_groups = min(int(wanted), max(MAX_GROUPS, num_workers), len(shards))
    return _groups_in_proportion(shards, _proportions(num_groups, num_workers))


def _few_for_each(num_workers: int) -> int:
    return num_workers * _GROUPS_PER_WORKER if num_workers > 1 else 1


def _proportions(num_groups: int, num_workers: int) -> list[float]:
    """Return how much work each group gets, in relation to the others.

    Equal for one worker, for whom nobody waits, and where there are so few groups that a large one
    would be more than half of what a worker gets in all.
    """
    per_worker = num_groups / num_workers
    slope = 0.0 if num_workers == 1 else min(max(per_worker / 2 - 1, 0.0), 1.0)
    # From (1 + slope) of the mean down to about (1 - slope) of it.
    steps = [(num_groups - 1 - 2 * place) / num_groups for place in range(num_groups)]
    return [1 + slope * step for step in steps]


def _groups_in_proportion(
    shards: Sequence[Shard], proportions: Sequence[float]
) -> list[list[Shard]]:
    """Cut into as many groups as there are proportions, none of them empty."""
    groups: list[list[Shard]] = []
    group: list[Shard] = []
    left, work = work_of(shards), 0.0
    for place, shard in enumerate(shards):
        group.append(shard)
        work += _work(shard)
        to_come = proportions[len(groups) :]
        wanted = left * to_come[0] / sum(to_come)
        # To the nearest shard: rounded up, the first groups would leave too little for the last.
        is_full = work + _work(shard) / 2 > wanted or len(shards) - place - 1 < len(to_come)
        if is_full and (len(to_come) > 1 or place == len(shards) - 1):
            groups.append(group)
            group, left, work = [], left - work, 0.0
    return groups


def _work(shard: Shard) -> float:
    return (shard.num_samples + shard.num_bytes / _BYTES_PER_IMAGE) / 2
