"""How shards are cut into the groups of tasks: by the work in them, not by their number."""

from collections.abc import Sequence
from typing import Literal

from storage.corpus import Shard

MAX_GROUPS = 100

# Images of a group: minutes at the hundreds of images that a core labels a second, and a part of
# one at the thousands of a GPU.
_IMAGES_PER_GROUP = 20_000
# The last groups keep some workers waiting: small ones for less long.
_GROUPS_PER_WORKER = 4
# To read and decode so many bytes costs about as much as the forward pass of a small network: 1 ms
# of a core (MobileNetV3-small at 224 px).
_BYTES_PER_IMAGE = 100_000


def work_of(shards: Sequence[Shard]) -> float:
    """Return the cost of labelling, in images of which half is decoding and half the network."""
    return sum(_work(shard) for shard in shards)


def group_shards(
    shards: Sequence[Shard], shards_per_task: int | Literal["auto"], *, num_workers: int
) -> list[list[Shard]]:
    """Cut the shards into groups, in order.

    Args:
        shards: in the corpus's order.
        shards_per_task: a number of shards; auto: groups of about equal work, minutes of it where
            there is so much, a few for each worker but at most 100 (or one for each of more
            workers).
        num_workers: how many groups are labelled at a time.
    """
    if shards_per_task != "auto":
        size = shards_per_task
        return [list(shards[start : start + size]) for start in range(0, len(shards), size)]
    wanted = max(-(-work_of(shards) // _IMAGES_PER_GROUP), _few_for_each(num_workers))
    num_groups = min(int(wanted), max(MAX_GROUPS, num_workers), len(shards))
    return _equal_groups(shards, num_groups)


def _few_for_each(num_workers: int) -> int:
    return num_workers * _GROUPS_PER_WORKER if num_workers > 1 else 1


def _equal_groups(shards: Sequence[Shard], num_groups: int) -> list[list[Shard]]:
    """Cut into exactly so many groups, none of them empty."""
    groups: list[list[Shard]] = []
    group: list[Shard] = []
    left, work = work_of(shards), 0.0
    for place, shard in enumerate(shards):
        group.append(shard)
        work += _work(shard)
        groups_left = num_groups - len(groups)
        is_full = work >= left / groups_left or len(shards) - place - 1 < groups_left
        if is_full and (groups_left > 1 or place == len(shards) - 1):
            groups.append(group)
            group, left, work = [], left - work, 0.0
    return groups


def _work(shard: Shard) -> float:
    return (shard.num_samples + shard.num_bytes / _BYTES_PER_IMAGE) / 2
