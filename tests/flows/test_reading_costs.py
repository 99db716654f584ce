"""Bytes that trainings read: worked by hand, with and without a cache."""

from typing import Any

import pytest

from flows.reading_costs import (
    ReadBytes,
    ReadingCosts,
    SelectedItems,
    StreamReads,
    stream_reads,
)
from models.noise import NoiseConfig, RandomResizedConfig
from models.objectives import FixMatchConfig, JointConfig
from storage.corpus import Corpus, Shard


def corpus(name: str, num_shards: int, num_bytes: int) -> Corpus:
    """Shards of 100 images each."""
    return Corpus.of(
        [
            Shard(f"{name}-{i}", f"{ord(name):02x}{i:02x}" * 16, 100, num_bytes)
            for i in range(num_shards)
        ]
    )


LABELED, UNLABELED = corpus("l", 2, 1_000), corpus("u", 10, 5_000)


def reads(lab: Any, *, selected: SelectedItems | None = None, **changes: Any) -> list[float]:
    """Passes of a training of 100 steps, 20 labelled images a step and twice as many others."""
    config = lab.config(**{"batch_size": 20, "unlabeled_ratio": 2} | changes)
    found = stream_reads(config, steps=100, labeled=LABELED, unlabeled=UNLABELED, selected=selected)
    return [read.passes for read in found]


# Crops at decoding keep nothing in memory, whatever its size.
STREAMED = {"noise": NoiseConfig(crop=RandomResizedConfig())}


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        # 100 steps of 20 images are 10 passes over 200; 4,000 are 4 over 1,000.
        (STREAMED, [10.0, 4.0]),
        # 500 selected items: 8 passes, each over all shards.
        (STREAMED | {"selected": SelectedItems(500, 0)}, [10.0, 8.0]),
        # What stays decoded in memory is read once.
        ({}, [1.0, 1.0]),
        (STREAMED | {"objective": JointConfig(labeled_images=False)}, [4.0]),
        # Targets of 8 GiB do not stay in memory, though 500 images would.
        ({"selected": SelectedItems(500, 2**33)}, [1.0, 8.0]),
        # A selection is nothing to an online objective.
        (
            STREAMED | {"objective": FixMatchConfig(), "selected": SelectedItems(500, 0)},
            [10.0, 4.0],
        ),
    ],
)
def test_passes_over_a_corpus_are_images_read_over_its_images(lab, changes, passes):
    assert reads(lab, **changes) == pytest.approx(passes)


BOTH = [StreamReads(LABELED, 10.0), StreamReads(UNLABELED, 4.0)]


def test_without_a_cache_every_pass_reads_the_corpus_and_with_one_the_first_alone():
    # 10 * 2,000 + 4 * 50,000 against 2,000 + 50,000.
    assert ReadingCosts(None).of_training(BOTH) == ReadBytes(220_000, 52_000)


def test_a_later_training_finds_what_an_earlier_one_has_read():
    costs = ReadingCosts(None)
    assert costs.of_training(BOTH[:1]) == ReadBytes(20_000, 2_000)
    assert costs.of_training(BOTH) == ReadBytes(220_000, 50_000)
    assert costs.of_training(BOTH) == ReadBytes(220_000, 0)


def test_a_cache_that_is_too_small_counts_for_nothing():
    costs = ReadingCosts(51_999)
    assert costs.of_training(BOTH) == ReadBytes(220_000, 220_000)
    # The labelled shards alone fit, and are found again.
    assert costs.of_training(BOTH[:1]) == ReadBytes(20_000, 2_000)
    assert costs.of_training(BOTH[:1]) == ReadBytes(20_000, 0)


def test_what_does_not_fit_beside_the_new_is_not_found_again():
    # 50,000 fit, and 2,000 do, but not both: the labelled shards make room.
    costs = ReadingCosts(51_000)
    assert costs.of_training(BOTH[:1]).cached == 2_000
    assert costs.of_training(BOTH[1:]).cached == 50_000
    assert costs.of_training(BOTH[:1]).cached == 2_000


def test_less_than_a_pass_reads_a_part():
    assert ReadingCosts(None).of_training([StreamReads(LABELED, 0.5)]) == ReadBytes(1_000, 1_000)
