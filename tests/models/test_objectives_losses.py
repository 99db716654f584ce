"""The losses between prediction and pseudo-label: golden values, properties, broken variants."""

import math

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from models.objectives.cross_entropy import soft_cross_entropy
from models.objectives.losses import PseudoLossConfig, pseudo_label_losses

KINDS = ["ce", "kl", "gce", "js", "mse_prob", "negative_learning"]
P = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
FIRST = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)


def config(kind: str, **settings: float) -> PseudoLossConfig:
    return TypeAdapter(PseudoLossConfig).validate_python({"kind": kind, **settings})


def loss(kind: str, logits: Tensor, targets: Tensor, **settings: float) -> Tensor:
    return pseudo_label_losses(config(kind, **settings), logits, targets)


def gradient(kind: str, logits: Tensor, targets: Tensor, **settings: float) -> Tensor:
    moved = logits.clone().requires_grad_()
    loss(kind, moved, targets, **settings).sum().backward()
    assert moved.grad is not None
    return moved.grad


def random_case(num_rows: int = 5, num_classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(num_rows, num_classes, generator=generator, dtype=torch.float64)
    targets = torch.rand(num_rows, num_classes, generator=generator, dtype=torch.float64)
    return logits, targets / targets.sum(dim=1, keepdim=True)


# ---------------------------------------------------------------------------------- golden values


@pytest.mark.parametrize(
    ("p_label", "expected"), [(0.5, 0.532064), (0.9, 0.101042), (0.1, 1.051888)]
)
def test_gce_matches_the_golden_values(p_label: float, expected: float):
    # (1 - .5^.8) / .8 = (1 - .574349) / .8
    logits = torch.tensor([[p_label, 1 - p_label]], dtype=torch.float64).log()
    assert loss("gce", logits, FIRST[:, :2], q=0.8).item() == pytest.approx(expected, abs=1e-6)


def test_js_matches_the_golden_value():
    # m = (.75, .15, .1); .5 log(1/.75) + .5 (.5 log(2/3) + .3 log 2 + .2 log 2) = .215762;
    # / .5 log 2 = .622556. Without the normaliser it would be .215762.
    assert loss("js", P.log(), FIRST, w=0.5).item() == pytest.approx(0.622556, abs=1e-6)


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 0.574346), (4.0, 0.807711)])
def test_kl_matches_the_golden_values(temperature: float, expected: float):
    # z_t = (3, 1, 0) against uniform: T^2 (log 3 - H(softmax(z_t / T))). Softening one side only
    # or leaving T^2 out (.050482 at T = 4) fails here.
    teacher = torch.softmax(torch.tensor([[3.0, 1.0, 0.0]], dtype=torch.float64), dim=1)
    found = loss("kl", torch.ones(1, 3, dtype=torch.float64), teacher, temperature=temperature)
    assert found.item() == pytest.approx(expected, abs=1e-6)


def test_kl_softens_the_student_too():
    # Student (3, 1, 0) and uniform teacher: KL(u || s) = -log 3 - mean log softmax(z_s / T).
    # T = 1: z - logsumexp = (-.169846, -2.169846, -3.169846), mean -1.836513: 1.836513 - log 3
    # T = 2: 4 (log(e^1.5 + e^.5 + 1) - mean of z / 2 - log 3)
    student = torch.tensor([[3.0, 1.0, 0.0]], dtype=torch.float64)
    uniform = torch.full((1, 3), 1 / 3, dtype=torch.float64)
    assert loss("kl", student, uniform, temperature=1).item() == pytest.approx(0.737901, abs=1e-6)
    log_sum = math.log(math.exp(1.5) + math.exp(0.5) + 1)
    by_hand = 4 * (log_sum - 2 / 3 - math.log(3))  # mean of z / 2 is 2 / 3
    assert loss("kl", student, uniform, temperature=2).item() == pytest.approx(by_hand, abs=1e-9)


def test_squared_error_is_the_mean_over_classes():
    # (.25 + .09 + .04) / 3; the sum over classes would be .38
    assert loss("mse_prob", P.log(), FIRST).item() == pytest.approx(0.38 / 3, abs=1e-9)


def test_negative_learning_matches_values_by_hand():
    # soft (.9, .06, .04): the third class alone is below .05: -log(1 - .2)
    soft = torch.tensor([[0.9, 0.06, 0.04]])
    assert loss("negative_learning", P.log(), soft).item() == pytest.approx(-math.log(0.8))
    # hard: both others, (-log .7 - log .8) / 2
    hard = loss("negative_learning", P.log(), FIRST).item()
    assert hard == pytest.approx(-(math.log(0.7) + math.log(0.8)) / 2)
    none = torch.tensor([[0.9, 0.05, 0.05]], dtype=torch.float64)  # exactly the bound: not negative
    assert loss("negative_learning", P.log(), none).item() == 0.0


# ---------------------------------------------------------------------------------- properties


def test_gce_lies_between_cross_entropy_and_absolute_error():
    logits, _ = random_case()
    hard = torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 3, 0]), 4).double()
    p_label = (logits.softmax(dim=1) * hard).sum(dim=1)
    torch.testing.assert_close(loss("gce", logits, hard, q=1.0), 1 - p_label)
    torch.testing.assert_close(
        loss("gce", logits, hard, q=1e-9), soft_cross_entropy(logits, hard), rtol=1e-6, atol=0
    )


def test_gradient_of_gce_is_that_of_cross_entropy_times_p_to_the_q():
    logits, _ = random_case()
    hard = torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 3, 0]), 4).double()
    p_label = (logits.softmax(dim=1) * hard).sum(dim=1, keepdim=True)
    expected = p_label**0.8 * gradient("ce", logits, hard)
    torch.testing.assert_close(gradient("gce", logits, hard, q=0.8), expected)


def test_js_is_symmetric_and_reaches_two_on_disjoint_supports():
    logits, targets = random_case()
    swapped = loss("js", targets.log(), logits.softmax(dim=1), w=0.5)
    torch.testing.assert_close(loss("js", logits, targets, w=0.5), swapped)
    assert bool((swapped > 0).all())
    assert bool((swapped < 2).all())
    # log 2 / (.5 log 2)
    disjoint = torch.tensor([[-400.0, 400.0, 0.0]], dtype=torch.float64)
    assert loss("js", disjoint, FIRST, w=0.5).item() == pytest.approx(2.0)
    assert gradient("js", disjoint, FIRST, w=0.5).isfinite().all()


def test_js_of_small_weight_is_cross_entropy():
    # JS_w / Z -> KL(y || p) as w -> 0, and KL of a one-hot label is cross entropy
    assert loss("js", P.log(), FIRST, w=1e-6).item() == pytest.approx(math.log(2), abs=1e-4)


def test_kl_is_zero_where_logits_agree_up_to_a_shift_and_only_there():
    logits, _ = random_case()
    same = loss("kl", logits + 7, logits.softmax(dim=1), temperature=3)
    assert same.abs().max().item() < 1e-12
    assert gradient("kl", logits + 7, logits.softmax(dim=1), temperature=3).abs().max() < 1e-12
    other = loss("kl", logits, logits.roll(1, dims=1).softmax(dim=1), temperature=3)
    assert bool((other > 1e-3).all())


def test_kl_at_temperature_one_has_the_gradient_of_cross_entropy():
    logits, targets = random_case()
    torch.testing.assert_close(gradient("kl", logits, targets), gradient("ce", logits, targets))


def test_gradient_of_kl_keeps_its_size_over_temperatures():
    # for large T the gradient tends to (z_s - z_t centred) / C: without T^2 it would fall as 1/T^2
    logits, _ = random_case()
    teacher = logits.roll(1, dims=0)
    difference = logits - teacher
    limit = (difference - difference.mean(dim=1, keepdim=True)) / 4
    found = gradient("kl", logits, teacher.softmax(dim=1), temperature=100)
    torch.testing.assert_close(found, limit, rtol=0, atol=0.02)


def test_negative_learning_moves_even_a_wholly_wrong_prediction():
    # p of the excluded class rounds to 1 in float32: d/dz -log(1 - p) = p = 1. With log(1 - p +
    # 1e-7), as UPS has it, the gradient is 0 there.
    logits = torch.tensor([[40.0, 0.0, 0.0]])
    targets = torch.tensor([[0.0, 0.5, 0.5]])
    assert loss("negative_learning", logits, targets).item() == pytest.approx(
        40 - math.log(2), abs=1e-4
    )
    assert gradient("negative_learning", logits, targets)[0].tolist() == pytest.approx(
        [1.0, -0.5, -0.5]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_of_rows_and_leave_targets_alone(kind: str):
    logits, targets = random_case()
    targets[:, 0] = 0.0  # a hard edge: 0 log 0
    targets = (targets / targets.sum(dim=1, keepdim=True)).requires_grad_()
    moved = logits.clone().requires_grad_()
    found = loss(kind, moved, targets)
    assert found.shape == (5,)
    assert bool((found >= 0).all())
    found.sum().backward()
    assert targets.grad is None
    assert moved.grad is not None
    assert moved.grad.isfinite().all()
    order = torch.tensor([4, 2, 0, 1, 3])
    torch.testing.assert_close(loss(kind, logits[order], targets[order]), found[order].detach())


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_lifted_and_double_precision_kept(kind: str):
    logits, targets = random_case()
    assert loss(kind, logits, targets.float()).dtype == torch.float64
    half = loss(kind, logits.bfloat16(), targets.float())
    assert half.dtype == torch.float32
    lifted = loss(kind, logits.bfloat16().float(), targets.float())
    assert torch.equal(half, lifted)  # in bfloat16 it would be off by 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_minimum_is_at_the_label(kind: str):
    """Descending a loss from a wrong prediction ends at the class of the label."""
    logits = torch.tensor([[0.0, 2.0, 0.0]], dtype=torch.float64)
    for _ in range(300):
        logits = logits - gradient(kind, logits, FIRST)
    assert logits.argmax().item() == 0


# ---------------------------------------------------------------------------------- config


def test_an_unknown_loss_is_refused_and_the_known_are_listed():
    with pytest.raises(ValidationError, match="'ce', 'kl', 'gce', 'js', 'mse_prob'"):
        config("focal")


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        ("kl", {"temperature": 0.0}),
        ("gce", {"q": 0.0}),
        ("gce", {"q": 1.1}),
        ("js", {"w": 1.0}),
        ("negative_learning", {"max_probability": 0.0}),
        ("ce", {"temperature": 2.0}),
    ],
)
def test_settings_outside_their_range_or_without_effect_are_refused(
    kind: str, setting: dict[str, float]
):
    with pytest.raises(ValidationError, match=next(iter(setting))):
        config(kind, **setting)
