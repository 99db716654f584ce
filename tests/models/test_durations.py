"""Durations: one unit, exact arithmetic, rounding down."""

import pytest
from pydantic import ValidationError

from models.durations import Duration


def test_350_epochs_of_imagenet_last_as_long_as_the_released_code():
    # 350 * 1,281,167 / 4,096 = 109,474.72..., rounded down
    assert Duration(labeled_epochs=350).to_steps(4096, 1_281_167) == 109_474


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        (Duration(steps=7), 7),
        (Duration(samples_seen=1000), 10),
        (Duration(samples_seen=1099), 10),
        (Duration(labeled_epochs=2), 10),
        (Duration(labeled_epochs=2.5), 12),  # 12.5
        (Duration(labeled_epochs=0.001), 1),  # never less than a step
        (Duration(samples_seen=1), 1),
    ],
)
def test_every_unit_is_rounded_down_to_at_least_one_step(duration: Duration, steps: int):
    assert duration.to_steps(batch_size=100, num_labeled=500) == steps


def test_decimal_epochs_mean_the_decimal_that_was_written():
    # as floats 0.29 * 100 is 28.999999999999996
    assert Duration(labeled_epochs=0.29).to_steps(1, 100) == 29


def test_steps_do_not_depend_on_the_data():
    assert Duration(steps=5).to_steps(1, 1) == Duration(steps=5).to_steps(999, 3) == 5


@pytest.mark.parametrize("given", [{}, {"steps": 1, "samples_seen": 2}])
def test_a_duration_has_exactly_one_unit(given: dict[str, int]):
    with pytest.raises(ValidationError, match="exactly one of steps, labeled_epochs, samples_seen"):
        Duration(**given)


@pytest.mark.parametrize(
    "given", [{"steps": 0}, {"labeled_epochs": 0}, {"labeled_epochs": float("inf")}]
)
def test_nothing_and_forever_are_no_durations(given: dict[str, float]):
    with pytest.raises(ValidationError):
        Duration.model_validate(given)


def test_an_empty_labelled_set_is_refused():
    with pytest.raises(ValueError, match="num_labeled=0"):
        Duration(labeled_epochs=1).to_steps(10, 0)


def test_json_round_trip_gives_the_same_duration():
    duration = Duration(labeled_epochs=2.4)
    assert Duration.model_validate_json(duration.model_dump_json()) == duration
