"""Learning rates, optimisers and the weight average against values worked by hand."""

import copy
import math
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from models.durations import Duration
from models.optimization import (
    LARS,
    AdamWConfig,
    ConstantConfig,
    CosineConfig,
    EmaConfig,
    FixMatchCosineConfig,
    LARSConfig,
    LinearConfig,
    OneCycleConfig,
    RMSpropTF,
    RMSpropTFConfig,
    ScheduleConfig,
    SGDConfig,
    StaircaseConfig,
    SwaConfig,
    build_optimizer,
    ema_decay,
    is_averaged,
    learning_rate,
    num_averaged,
    peak_learning_rate,
    recompute_batchnorm,
    update_ema,
    update_swa,
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


def test_linear_falls_from_the_peak_after_warmup_to_its_final_fraction():
    # 100 steps after 10 of warm-up: 2 * (0.1 + 0.9 * (1 - k / 100))
    schedule = LinearConfig(final_fraction=0.1)
    rates = [rate(step, schedule, warmup_steps=10) for step in (5, 10, 60, 85, 110)]
    assert rates == pytest.approx([1.0, 2.0, 1.1, 0.65, 0.2])


def test_fixmatchs_cosine_ends_at_a_fifth_of_the_peak():
    # 2 * cos(7 pi k / (16 K)): k = 0: 2; k = K / 2: 2 * cos(39.375 deg) = 1.5460210;
    # k = K: 2 * cos(78.75 deg) = 0.3901806. The half cosine (broken variant) ends at 0.
    rates = [rate(step, FixMatchCosineConfig()) for step in (0, 55, 110)]
    assert rates == pytest.approx([2.0, 1.5460210, 0.3901806], abs=1e-7)


@pytest.mark.parametrize(
    ("anneal", "expected"),
    [
        # Rise in 33 of 110 steps from 0.08 to 2, fall in 77 to 8e-6. Half way up: (0.08 + 2) / 2.
        # A quarter of the fall: linear 2 - 0.25 * 2; cosine (1 + cos 45 deg) / 2 * 2 = 1.7071068.
        ("linear", [0.08, 1.04, 2.0, 1.500002, 0.000008]),
        ("cosine", [0.08, 1.04, 2.0, 1.7071080, 0.000008]),
    ],
)
def test_one_cycle_rises_and_falls(anneal: Literal["linear", "cosine"], expected: list[float]):
    schedule = OneCycleConfig(anneal=anneal)
    rates = [rate(step, schedule) for step in (0, 16.5, 33, 52.25, 110)]  # type: ignore[arg-type]
    assert rates == pytest.approx(expected, abs=1e-7)


def test_one_cycle_is_torchs():
    # torch's phases end at 0.3 * T - 1 and T - 1 for T scheduler steps: with T = 11 and a rise of
    # 0.2 of our 10 steps both turn at step 2 (torch: pct_start 3 / 11) and end at step 10.
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=2.0, total_steps=11, pct_start=3 / 11, cycle_momentum=False
    )
    for step in range(11):
        ours = learning_rate(
            step,
            peak=2.0,
            schedule=OneCycleConfig(rise_fraction=0.2),
            warmup=None,
            total_steps=10,
            batch_size=1,
            num_labeled=1,
        )
        assert ours == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        if step < 10:
            theirs.step()


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


def test_lars_matches_two_steps_worked_by_hand():
    weight = nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    optimizer = LARS([weight], lr=2.0, momentum=0.5, trust_coefficient=0.1, weight_decay=0.5)
    weight.grad = torch.tensor([[4.5, 6.0]], dtype=torch.float64)
    optimizer.step()
    # g = (4.5, 6) + 0.5 * (3, 4) = (6, 8), length 10; |w| = 5; trust 0.1 * 5 / 10 = 0.05
    # momentum 2 * 0.05 * (6, 8) = (0.6, 0.8); w = (2.4, 3.2). Plain SGD would be at (-9, -12);
    # the length of the gradient without decay (7.5) would give (2.2, 2.9333).
    assert weight.tolist()[0] == pytest.approx([2.4, 3.2], abs=1e-12)
    weight.grad = torch.tensor([[6.8, -1.6]], dtype=torch.float64)
    optimizer.step()
    # g = (6.8, -1.6) + (1.2, 1.6) = (8, 0), length 8; |w| = 4; trust 0.05
    # momentum 0.5 * (0.6, 0.8) + 2 * 0.05 * (8, 0) = (1.1, 0.4)
    assert weight.tolist()[0] == pytest.approx([1.3, 2.8], abs=1e-12)


def test_lars_step_does_not_depend_on_the_scale_of_the_loss():
    def moved(scale: float) -> Tensor:
        weight = nn.Parameter(torch.tensor([[1.0, 2.0]], dtype=torch.float64))
        weight.grad = scale * torch.tensor([[0.3, -0.1]], dtype=torch.float64)
        LARS([weight], lr=1.0).step()
        return weight.detach()

    torch.testing.assert_close(moved(1.0), moved(1e6))


@pytest.mark.parametrize(("value", "gradient"), [(0.0, 1.0), (1.0, 0.0)])
def test_lars_takes_a_plain_step_where_a_norm_is_zero(value: float, gradient: float):
    # Broken variant: weights of zeros (the last layer of a block) never move, or become NaN.
    weight = nn.Parameter(torch.full((1, 2), value))
    weight.grad = torch.full((1, 2), gradient)
    LARS([weight], lr=0.1, momentum=0).step()
    assert weight.tolist() == [[pytest.approx(value - 0.1 * gradient)] * 2]


def test_lars_neither_decays_nor_scales_biases():
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(LARSConfig(lr=0.1, momentum=0), model)
    before = model.bias.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.bias.detach(), before - 0.1)
    torch.testing.assert_close(  # a length of 0.1 * 1e-3 of the weights'
        (optimizer.state[model.weight]["momentum_buffer"]).norm(),
        1e-4 * (model.weight + optimizer.state[model.weight]["momentum_buffer"]).norm(),
    )


# ---------------------------------------------------------------------------- swa


def test_swa_takes_weights_at_regular_steps_of_the_last_part():
    # N = 100, from 0.29 * 100 = 29 exactly (28.999... in binary): 31, 33, ... and so on
    config = SwaConfig(start_fraction=0.29, every_steps=2)
    taken = [n for n in range(101) if is_averaged(n, config, total_steps=100)]
    assert taken == list(range(31, 101, 2))
    assert num_averaged(32, config, total_steps=100) == 1
    assert num_averaged(29, config, total_steps=100) == 0
    everything = SwaConfig(start_fraction=0)
    assert [is_averaged(n, everything, total_steps=3) for n in (1, 2, 3)] == [True] * 3


def test_swa_is_the_plain_mean_and_forgets_what_it_started_from():
    # 2, 4 and 9 have mean 5. Broken variants: counting the start (25 / 4 with 10), or a moving
    # average of constant rate (1/2: 6).
    model, mean = nn.Linear(1, 1), nn.Linear(1, 1)
    with torch.no_grad():
        mean.weight.fill_(10.0)
        for number, value in enumerate([2.0, 4.0, 9.0]):
            model.weight.fill_(value)
            update_swa(mean, model, number)
    assert mean.weight.item() == pytest.approx(5.0)
    assert torch.equal(mean.bias, model.bias)


def test_recomputed_batchnorm_is_the_mean_over_batches_without_dropout():
    # Two batches with values 0, 2 and 4, 8: means 1 and 6, unbiased variances 2 and 8.
    norm, last = nn.BatchNorm1d(1, momentum=0.3), nn.Linear(1, 1)
    model = nn.Sequential(nn.Dropout(0.9), norm, last)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.fill_(99.0)
    before = last.weight.clone()
    batches = [torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [8.0]])]
    model.eval()
    recompute_batchnorm(model, iter(batches))
    assert norm.running_mean.item() == pytest.approx(3.5)
    assert norm.running_var.item() == pytest.approx(5.0)
    assert (norm.momentum, norm.training, model.training) == (0.3, False, False)
    assert torch.equal(last.weight, before)
    recompute_batchnorm(nn.Linear(1, 1), (pytest.fail("no batch is needed") for _ in range(1)))


@pytest.mark.parametrize("config", [AdamWConfig(), SGDConfig(), RMSpropTFConfig(), LARSConfig()])
def test_biases_and_batchnorm_are_not_decayed(
    config: AdamWConfig | SGDConfig | RMSpropTFConfig | LARSConfig,
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


def test_layer_scales_and_class_tokens_are_not_decayed():
    model = nn.Module()
    shapes = {"layer_scale": (8, 1, 1), "class_token": (1, 1, 8), "position": (1, 5, 8)}
    for name, shape in shapes.items():
        model.register_parameter(name, nn.Parameter(torch.ones(shape)))
    optimizer = build_optimizer(AdamWConfig(), model)
    decays = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    named = {name: decays[id(p)] for name, p in model.named_parameters()}
    assert named == {"layer_scale": 0, "class_token": 0, "position": 0.05}
