"""Learning rates, optimisers and the weight average against values worked by hand."""

import copy
import math

import pytest
import torch
from torch import nn

from models.durations import Duration
from models.optimization import (
    AdamWConfig,
    ConstantConfig,
    CosineConfig,
    EmaConfig,
    RMSpropTF,
    RMSpropTFConfig,
    ScheduleConfig,
    SGDConfig,
    StaircaseConfig,
    build_optimizer,
    ema_decay,
    learning_rate,
    peak_learning_rate,
    update_ema,
)


def noisy_student_rate(epoch: float, *, epochs: int = 350, decay_epochs: float = 2.4) -> float:
    """1,000 steps an epoch, so that every epoch of the golden table is a whole step."""
    return learning_rate(
        round(epoch * 1000),
        peak=peak_learning_rate(RMSpropTFConfig(), batch_size=2048),
        schedule=StaircaseConfig(decay_every=Duration(labeled_epochs=decay_epochs)),
        warmup=Duration(labeled_epochs=5),
        total_steps=epochs * 1000,
        batch_size=2048,
        num_labeled=2_048_000,
    )


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [
        (0, 0.0),
        (2.5, 0.0640),  # half of 0.016 * 2048 / 256 = 0.128
        (5, 0.120435),  # 0.128 * 0.97^2
        (100, 0.036716),  # 0.128 * 0.97^41
        (349.9, 0.00154565),  # 0.128 * 0.97^145
    ],
)
def test_learning_rate_is_the_released_noisy_students(epoch: float, expected: float):
    assert noisy_student_rate(epoch) == pytest.approx(expected, rel=1e-5)


def test_700_epoch_schedule_ends_at_the_same_rate():
    assert noisy_student_rate(699.8, epochs=700, decay_epochs=4.8) == pytest.approx(
        0.00154565, rel=1e-5
    )


def rate(step: int, schedule: ScheduleConfig, warmup_steps: int = 0) -> float:
    return learning_rate(
        step,
        peak=2.0,
        schedule=schedule,
        warmup=Duration(steps=warmup_steps) if warmup_steps else None,
        total_steps=110,
        batch_size=1,
        num_labeled=1,
    )


def test_cosine_goes_from_the_peak_after_warmup_to_its_final_fraction():
    schedule = CosineConfig(final_fraction=0.1)
    assert rate(5, schedule, warmup_steps=10) == 1.0
    assert rate(10, schedule, warmup_steps=10) == 2.0
    assert rate(60, schedule, warmup_steps=10) == pytest.approx(1.1)  # (2 + 0.2) / 2
    assert rate(110, schedule, warmup_steps=10) == pytest.approx(0.2)


def test_constant_stays_at_the_peak():
    assert [rate(s, ConstantConfig()) for s in (0, 109)] == [2.0, 2.0]


def test_staircase_drops_at_unrounded_intervals():
    # every 2.5 steps: drops at steps 3, 5, 8, 10
    schedule = StaircaseConfig(decay_rate=0.5, decay_every=Duration(labeled_epochs=2.5))
    rates = [rate(s, schedule) for s in range(11)]
    assert rates == [2, 2, 2, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.125]


def test_a_warmup_as_long_as_the_training_is_refused():
    with pytest.raises(ValueError, match="warmup of 110 steps must be shorter"):
        rate(0, ConstantConfig(), warmup_steps=110)


def test_linear_scaling_counts_labelled_images_only():
    config = SGDConfig(lr=0.1, lr_scaling="linear_256")
    assert peak_learning_rate(config, batch_size=64) == pytest.approx(0.025)
    assert peak_learning_rate(SGDConfig(lr=0.1), batch_size=64) == 0.1


@pytest.mark.parametrize(
    ("n", "expected"), [(0, 0.1), (9, 0.526316), (99, 0.917431), (99_999, 0.9999)]
)
def test_ema_ramp_is_tensorflows(n: int, expected: float):
    assert ema_decay(n, EmaConfig(decay=0.9999)) == pytest.approx(expected, abs=5e-7)


def test_without_ramp_the_decay_is_constant():
    assert ema_decay(0, EmaConfig(decay=0.5, tf_ramp=False)) == 0.5


def test_ema_covers_batchnorm_statistics_and_copies_counters():
    model = nn.BatchNorm1d(1)
    ema = copy.deepcopy(model)
    with torch.no_grad():
        model.weight.fill_(3.0)
    assert model.running_mean is not None
    assert model.num_batches_tracked is not None
    model.running_mean.fill_(8.0)
    model.num_batches_tracked.fill_(5)
    update_ema(ema, model, 0.75)
    state = ema.state_dict()
    assert state["weight"].item() == 1.5  # 0.75 * 1 + 0.25 * 3
    assert state["running_mean"].item() == 2.0  # 0.75 * 0 + 0.25 * 8
    assert state["num_batches_tracked"].item() == 5


def test_rmsprop_tf_matches_two_steps_worked_by_hand():
    weight = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = RMSpropTF([weight], lr=0.1, decay=0.9, momentum=0.9, eps=1e-3)
    weight.grad = torch.tensor([2.0], dtype=torch.float64)
    optimizer.step()
    # mean square 0.9 * 1 + 0.1 * 4 = 1.3; momentum 0.1 * 2 / sqrt(1.301) = 0.1753435
    first = 0.2 / math.sqrt(1.301)
    assert weight.item() == pytest.approx(1 - first, abs=1e-12)
    optimizer.step()
    # mean square 0.9 * 1.3 + 0.4 = 1.57
    second = 0.9 * first + 0.2 / math.sqrt(1.571)
    assert weight.item() == pytest.approx(1 - first - second, abs=1e-12)


def test_rmsprop_tf_decays_weights_through_the_gradient():
    weight = nn.Parameter(torch.tensor([[2.0]], dtype=torch.float64))
    optimizer = RMSpropTF([weight], lr=0.1, eps=1e-3, weight_decay=0.5)
    weight.grad = torch.tensor([[0.0]], dtype=torch.float64)
    optimizer.step()
    # gradient 0.5 * 2 = 1; mean square 0.9 + 0.1 = 1
    assert weight.item() == pytest.approx(2 - 0.1 / math.sqrt(1.001), abs=1e-12)


@pytest.mark.parametrize("config", [AdamWConfig(), SGDConfig(), RMSpropTFConfig()])
def test_biases_and_batchnorm_are_not_decayed(
    config: AdamWConfig | SGDConfig | RMSpropTFConfig,
):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    optimizer = build_optimizer(config, model)
    decays = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    named = {name: decays[id(p)] for name, p in model.named_parameters()}
    assert config.weight_decay > 0
    assert named == {
        "0.weight": config.weight_decay,
        "0.bias": 0,
        "1.weight": 0,
        "1.bias": 0,
        "3.weight": config.weight_decay,
        "3.bias": 0,
    }
