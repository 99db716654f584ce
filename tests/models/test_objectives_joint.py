"""The options of the joint objective, each against a value by hand and a known-broken variant."""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from models.objectives import (
    Batch,
    FixMatchConfig,
    JointConfig,
    JointObjective,
    Models,
    ObjectiveConfig,
    StepLoss,
    Stream,
    build_objective,
    reads_class_prior,
)
from models.objectives.annealing import annealed, annealing_threshold
from models.objectives.consistency import js_consistency
from models.objectives.margin import log_prior, with_margin
from models.objectives.normalization import balance
from storage.addresses import settings_of

PRIOR = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)


@dataclass(frozen=True)
class Sizes:
    batch_size: int
    unlabeled_ratio: int


class FixedLogits(nn.Module):
    """Answers with given logits and keeps what it was asked."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images)
        assert len(images) == len(self.logits)
        return self.logits


def images(n: int) -> Tensor:
    return torch.zeros(n, 3, 2, 2)


def joint(**settings: Any) -> JointConfig:
    return JointConfig.model_validate({"label_smoothing": 0.0, **settings})


def step_loss(
    config: JointConfig,
    batch: Batch,
    logits: Tensor,
    *,
    state: dict[str, Tensor] | None = None,
    progress: float = 0.0,
    class_prior: Tensor | None = None,
) -> tuple[StepLoss, Tensor]:
    """The loss and its gradient by the logits."""
    objective = build_objective(config, class_prior)
    student = FixedLogits(logits)
    if state is None:
        state = objective.init_state(logits.shape[1])
    found = objective.loss(Models(student), batch, state, round(progress * 100), 100)
    found.loss.backward()
    assert student.logits.grad is not None
    return found, student.logits.grad


def random_batch(num_labeled: int = 4, num_pseudo: int = 8) -> tuple[Batch, Tensor]:
    generator = torch.Generator().manual_seed(1)
    n = num_labeled + num_pseudo
    soft = torch.rand(num_pseudo, 3, generator=generator, dtype=torch.float64)
    batch = Batch(
        images(n),
        torch.randint(3, (num_labeled,), generator=generator),
        soft / soft.sum(dim=1, keepdim=True),
        torch.rand(num_pseudo, generator=generator, dtype=torch.float64),
    )
    return batch, torch.randn(n, 3, generator=generator, dtype=torch.float64)


# ---------------------------------------------------------------------------------- pseudo_loss


def test_pseudo_loss_is_of_pseudo_labels_only_and_weighted():
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]]).log()
    targets = torch.tensor([[1.0, 0.0, 0.0]])
    batch = Batch(images(2), torch.tensor([0]), targets, torch.tensor([0.5]))
    found, _ = step_loss(joint(pseudo_loss={"kind": "gce", "q": 0.8}), batch, logits)
    # cross entropy log 2 for the label; .5 * .532064 for the pseudo-label
    assert found.logs["labeled_loss"].item() == pytest.approx(math.log(2), abs=1e-6)
    assert found.logs["pseudo_loss"].item() == pytest.approx(0.266032, abs=1e-6)
    assert found.loss.item() == pytest.approx(math.log(2) + 0.266032, abs=1e-6)


@pytest.mark.parametrize("is_hard", [False, True])
def test_every_loss_smooths_hard_targets_only(is_hard: bool):
    logits = torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    batch = Batch(images(2), torch.tensor([0]), torch.tensor([[1.0, 0.0]]), pseudo_is_hard=is_hard)
    found, _ = step_loss(
        joint(pseudo_loss={"kind": "mse_prob"}, label_smoothing=0.2), batch, logits
    )
    p = 1 / (1 + math.exp(-3))
    target = 0.9 if is_hard else 1.0
    assert found.logs["pseudo_loss"].item() == pytest.approx((target - p) ** 2, abs=1e-6)


def test_negative_learning_reads_hard_labels_unsmoothed():
    """Smoothed over two classes, 0.05 would not be below 0.05: nothing to exclude, loss 0."""
    logits = torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    batch = Batch(images(2), torch.tensor([0]), torch.tensor([[1.0, 0.0]]), pseudo_is_hard=True)
    config = joint(pseudo_loss={"kind": "negative_learning"}, label_smoothing=0.1)
    found, _ = step_loss(config, batch, logits)
    # -log(1 - p_1) = -log p_0 = log(1 + e^-3)
    assert found.logs["pseudo_loss"].item() == pytest.approx(math.log1p(math.exp(-3)), abs=1e-6)


# ---------------------------------------------------------------------------------- margin


def test_margin_matches_the_golden_values():
    # z = (2, 1, 0), tau .4: plain cross entropy is (.407606, 1.407606, 2.407606); the head becomes
    # cheaper, the tail dearer. Minus in place of plus gives (.642880, 1.141775, 1.864517). A prior
    # averaged over the classes too (USB's DebiasPL) gives the plain values.
    logits = torch.tensor([[2.0, 1.0, 0.0]] * 4, dtype=torch.float64)
    batch = Batch(images(4), torch.tensor([2]), torch.eye(3, dtype=torch.float64))
    for k, expected in enumerate((0.250777, 1.751882, 3.029141)):
        one = replace(
            batch, images=images(2), pseudo_targets=torch.eye(3, dtype=torch.float64)[k : k + 1]
        )
        found, _ = step_loss(joint(margin=0.4), one, logits[:2], class_prior=PRIOR)
        assert found.logs["pseudo_loss"].item() == pytest.approx(expected, abs=1e-6)
        assert found.logs["labeled_loss"].item() == pytest.approx(2.407606, abs=1e-6)


def test_learning_a_balanced_label_under_a_margin_favours_rare_classes():
    # softmax(z + tau log p) = uniform at z = -tau log p: there the gradient is 0
    uniform = torch.full((1, 3), 1 / 3, dtype=torch.float64)
    logits = torch.cat([torch.zeros(1, 3).double(), -0.4 * PRIOR.log()[None]])
    batch = Batch(images(2), torch.tensor([0]), uniform)
    _, gradient = step_loss(joint(margin=0.4), batch, logits, class_prior=PRIOR)
    assert gradient[1].abs().max().item() < 1e-9


def test_agreement_under_a_margin_is_that_of_the_plain_logits():
    # z = (0, .5, 0) says class 1; with the margin it would say class 0 (.4 * log(.7 / .2) = .501)
    logits = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.5, 0.0]])
    batch = Batch(images(2), torch.tensor([0]), torch.tensor([[0.0, 1.0, 0.0]]))
    assert with_margin(logits[1:], PRIOR.log(), 0.4).argmax().item() == 0
    found, _ = step_loss(joint(margin=0.4), batch, logits, class_prior=PRIOR)
    assert found.logs["pseudo_accuracy"].item() == 1.0


def test_a_margin_without_prior_is_refused_and_labels_alone_need_none():
    batch, logits = random_batch()
    with pytest.raises(ValueError, match="pass class_prior to build_objective"):
        step_loss(joint(margin=0.4), batch, logits)
    step_loss(joint(margin=0.4), Batch(images(4), batch.labels), logits[:4])
    assert reads_class_prior(joint(margin=0.4))
    assert not reads_class_prior(joint())
    assert not reads_class_prior(FixMatchConfig())


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (torch.tensor([0.7, 0.2]), "sum 0.8"),
        (torch.tensor([1.2, -0.2]), "minimum -0.2"),
        (torch.tensor([math.nan, 1.0]), "sum nan"),
        (torch.full((2, 2), 0.25), "must be \\(C,\\)"),
    ],
)
def test_a_prior_that_is_no_distribution_is_refused(prior: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        log_prior(prior)


def test_a_class_that_was_never_predicted_has_a_finite_margin():
    assert log_prior(torch.tensor([1.0, 0.0], dtype=torch.float64)).isfinite().all()


# ---------------------------------------------------------------------------------- annealing


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", (0.1, 0.55, 1.0)),
        ("log", (0.1, 0.926124, 0.993936)),
        ("exp", (0.106064, 0.173876, 1.0)),
    ],
)
def test_annealing_thresholds_match_the_golden_values(
    schedule: Any, expected: tuple[float, float, float]
):
    found = [annealing_threshold(schedule, t, 10) for t in (0.0, 0.5, 1.0)]
    assert found == pytest.approx(expected, abs=1e-6)


def test_annealing_means_over_the_labels_that_are_left():
    # p of the label .9 .5 .25 .1, threshold .5 (kept where equal): (2 + 3 + 4) / 3. The mean over
    # all four, 2.25, would shrink the labelled gradient with the number kept.
    of_label = torch.tensor([0.9, 0.5, 0.25, 0.1], dtype=torch.float64)
    logits = torch.stack([of_label, 1 - of_label], dim=1).log()
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    labels = torch.zeros(4, dtype=torch.int64)
    assert annealed(losses, logits, labels, 0.5).mean().item() == pytest.approx(3.0)
    assert annealed(losses, logits, labels, 0.01).mean().item() == 0.0


@pytest.mark.parametrize(("progress", "kept"), [(0.0, 1), (0.5, 2), (1.0, 3)])
def test_annealing_follows_the_progress_of_the_training(progress: float, kept: int):
    # C = 2, linear: thresholds .5, .75, 1 for labels known with .4, .7 and .99
    of_label = torch.tensor([0.4, 0.7, 0.99], dtype=torch.float64)
    logits = torch.stack([of_label, 1 - of_label], dim=1).log()
    batch = Batch(images(3), torch.zeros(3, dtype=torch.int64))
    found, gradient = step_loss(joint(tsa="linear"), batch, logits, progress=progress)
    assert int((gradient.abs().sum(dim=1) > 0).sum()) == kept
    assert found.loss.item() == pytest.approx(-of_label[:kept].log().mean().item(), abs=1e-6)


# ---------------------------------------------------------------------------------- normaliser


def moving_average_run(scale: float, num_steps: int) -> tuple[Tensor, Tensor]:
    """Loss and gradient after steps in which all pseudo-labelled losses are `scale` times."""
    batch, logits = random_batch()
    assert batch.pseudo_weights is not None
    batch = replace(batch, pseudo_weights=batch.pseudo_weights * scale)
    config = joint(loss_normalization="moving_average", unlabeled_weight=2.0)
    objective = JointObjective(config)
    state = objective.init_state(3)
    for _ in range(num_steps):
        found, _ = step_loss(config, batch, logits, state=state)
        state = objective.next_state(state, found.statistics)
    found, gradient = step_loss(config, batch, logits, state=state)
    return found.loss.detach(), gradient


def test_moving_average_makes_the_scale_of_pseudo_losses_meaningless():
    loss, gradient = moving_average_run(1.0, 3)
    scaled_loss, scaled_gradient = moving_average_run(7.0, 3)
    torch.testing.assert_close(scaled_loss, loss)
    torch.testing.assert_close(scaled_gradient, gradient)
    # before the first step nothing is known, so that the scale still shows
    assert not torch.allclose(moving_average_run(7.0, 0)[1], moving_average_run(1.0, 0)[1])


def test_moving_average_matches_a_value_by_hand():
    # averages 1 and 4 -> ratio 1/4; mean losses log 2 (both); w = 2:
    # (log 2 + 2 * log 2 / 4) / 3 = log 2 / 2. No gradient goes through the ratio.
    batch = Batch(images(3), torch.tensor([0]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    config = joint(loss_normalization="moving_average", unlabeled_weight=2.0)
    state = {
        "labeled_loss": torch.tensor(1.0, dtype=torch.float64),
        "pseudo_loss": torch.tensor(4.0, dtype=torch.float64),
    }
    found, gradient = step_loss(config, batch, torch.zeros(3, 2), state=state)
    assert found.loss.item() == pytest.approx(math.log(2) / 2, abs=1e-6)
    # d/dz of the label: (p - q) / 3 = (-.5, .5) / 3
    assert gradient[0].tolist() == pytest.approx([-1 / 6, 1 / 6], abs=1e-6)
    # of a pseudo-label: 2 * 1/4 / 3 / 2 rows = 1/12 of (-.5, .5)
    assert gradient[1].tolist() == pytest.approx([-1 / 24, 1 / 24], abs=1e-6)
    after = JointObjective(config).next_state(state, found.statistics)
    assert after["labeled_loss"].item() == pytest.approx(0.99 + 0.01 * math.log(2), abs=1e-6)
    assert after["pseudo_loss"].item() == pytest.approx(3.96 + 0.01 * math.log(2), abs=1e-6)


def test_moving_average_starts_with_ratio_one_and_survives_losses_of_zero():
    state = JointObjective(joint(loss_normalization="moving_average")).init_state(3)
    assert balance(state).item() == 1.0
    labels_alone = JointObjective(joint(loss_normalization="moving_average"))
    assert labels_alone.next_state(state, {}) == state


# ------------------------------------------------------------------------- what mixing leaves


def test_mixed_labels_are_targets_as_they_are():
    # (.6, .4) against p = (.75, .25); the argmax, or the label of the batch, would cost .287682
    # or 1.386294; smoothing once more would cost another value again
    logits = torch.log(torch.tensor([[0.75, 0.25]]))
    batch = Batch(images(1), torch.tensor([1]), label_targets=torch.tensor([[0.6, 0.4]]))
    found, _ = step_loss(joint(label_smoothing=0.2), batch, logits)
    expected = -(0.6 * math.log(0.75) + 0.4 * math.log(0.25))
    assert found.loss.item() == pytest.approx(expected, abs=1e-6)
    assert found.logs["labeled_accuracy"].item() == 1.0


def test_annealing_of_mixed_labels_is_refused():
    batch = Batch(images(1), torch.tensor([1]), label_targets=torch.tensor([[0.6, 0.4]]))
    with pytest.raises(ValueError, match="leave one of them out"):
        step_loss(joint(tsa="log"), batch, torch.zeros(1, 2))


# ---------------------------------------------------------------------------------- pseudo alone


@pytest.mark.parametrize("normalization", ["labeled_batch", "concat_mean"])
def test_pseudo_labels_alone_give_their_weighted_mean(normalization: str):
    config = joint(labeled_images=False, loss_normalization=normalization)
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    batch = Batch(images(2), torch.zeros(0, dtype=torch.int64), targets, torch.tensor([1.0, 0.5]))
    found, _ = step_loss(config, batch, torch.zeros(2, 2))
    assert found.loss.item() == pytest.approx(0.75 * math.log(2), abs=1e-6)
    assert set(found.logs) == {"pseudo_loss", "pseudo_accuracy"}
    assert JointObjective(config).streams(Sizes(8, 3)) == (
        Stream("pseudo_labeled", 24, with_selection=True),
    )
    with pytest.raises(ValueError, match="unlabeled_ratio to at least 1"):
        JointObjective(config).streams(Sizes(8, 0))


@pytest.mark.parametrize(
    "option",
    [
        {"tsa": "log"},
        {"consistency": {}},
        {"decoupled_head": {}},
        {"loss_normalization": "moving_average"},
    ],
)
def test_options_of_labels_are_refused_without_them(option: dict[str, Any]):
    with pytest.raises(ValidationError, match=f"{next(iter(option))}.*labeled_images=false"):
        joint(labeled_images=False, **option)


# ---------------------------------------------------------------------------------- parts


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss_normalization": "concat_mean"},
        {"loss_normalization": "moving_average"},
        {"margin": 0.4, "pseudo_loss": {"kind": "js", "w": 0.5}},
        {"pseudo_loss": {"kind": "negative_learning", "max_probability": 0.2}},
    ],
)
def test_the_parts_of_a_batch_average_to_the_whole(settings: dict[str, Any]):
    """In loss, gradient and statistics; a mean over kept or weighted rows would not."""
    batch, logits = random_batch()
    assert batch.pseudo_targets is not None
    assert batch.pseudo_weights is not None
    config = joint(**settings)
    state = {
        "labeled_loss": torch.tensor(1.0, dtype=torch.float64),
        "pseudo_loss": torch.tensor(3.0, dtype=torch.float64),
    }
    whole, whole_gradient = step_loss(config, batch, logits, state=state, class_prior=PRIOR)
    losses: list[Tensor] = []
    statistics: list[dict[str, Tensor]] = []
    mean_gradient = torch.zeros_like(whole_gradient)
    for part in range(2):
        labeled, pseudo = slice(part * 2, part * 2 + 2), slice(part * 4, part * 4 + 4)
        rows = [*range(part * 2, part * 2 + 2), *range(4 + part * 4, 8 + part * 4)]
        half = Batch(
            images(6),
            batch.labels[labeled],
            batch.pseudo_targets[pseudo],
            batch.pseudo_weights[pseudo],
        )
        found, gradient = step_loss(config, half, logits[rows], state=state, class_prior=PRIOR)
        losses.append(found.loss.detach())
        statistics.append(found.statistics)
        mean_gradient[rows] += gradient / 2
    torch.testing.assert_close(torch.stack(losses).mean(), whole.loss.detach())
    torch.testing.assert_close(mean_gradient, whole_gradient)
    assert whole.loss.dtype == torch.float64
    for name, value in whole.statistics.items():
        torch.testing.assert_close(torch.stack([s[name] for s in statistics]).mean(), value)


# ---------------------------------------------------------------------------------- consistency


def test_consistency_matches_a_value_by_hand():
    # p = (.5 .3 .2), (.2 .3 .5), (.3 .4 .3): the mean is uniform, and KL(p || u) = log 3 - H(p):
    # (.068960 + .068960 + .009712) / 3. A mean of logits in place of probabilities gives another.
    views = [[0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.3, 0.4, 0.3]]
    logits = tuple(torch.tensor([v], dtype=torch.float64).log() for v in views)
    assert js_consistency(logits).item() == pytest.approx(0.049210, abs=1e-6)
    assert js_consistency((logits[0], logits[0] + 3)).item() == pytest.approx(0, abs=1e-12)


def test_consistency_joins_three_views_in_one_forward_pass():
    config = joint(consistency={"weight": 12.0})
    labeled = Stream("labeled", 8, views=("weak", "strong", "strong"))
    assert JointObjective(config).streams(Sizes(8, 0)) == (labeled,)
    # order of the rows: labelled weak, pseudo-labelled, labelled strong twice
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.05, 0.05], [0.2, 0.3, 0.5], [0.3, 0.4, 0.3]])
    batch = Batch(
        images(2),
        torch.tensor([0]),
        torch.tensor([[1.0, 0.0, 0.0]]),
        views={"labeled_2": images(1) + 0.2, "labeled_3": images(1) + 0.3},
    )
    student = FixedLogits(probs.log())
    found = JointObjective(config).loss(Models(student), batch, {}, 0, 1)
    (seen,) = student.seen
    assert seen[:, 0, 0, 0].tolist() == pytest.approx([0.0, 0.0, 0.2, 0.3])
    found.loss.backward()
    gradient = student.logits.grad
    assert gradient is not None
    assert found.logs["consistency"].item() == pytest.approx(0.049210, abs=1e-6)
    assert found.logs["labeled_loss"].item() == pytest.approx(math.log(2), abs=1e-6)
    expected = math.log(2) + 12 * 0.049210 - math.log(0.9)
    assert found.loss.item() == pytest.approx(expected, abs=1e-5)
    assert bool((gradient.abs().sum(dim=1) > 0).all())  # all views learn


# ---------------------------------------------------------------------------------- config


def test_settings_without_kind_are_of_joint():
    adapter = TypeAdapter[ObjectiveConfig](ObjectiveConfig)
    assert adapter.validate_python({"label_smoothing": 0.2}) == JointConfig(label_smoothing=0.2)
    assert adapter.validate_python({"kind": "fixmatch"}) == FixMatchConfig()
    with pytest.raises(ValidationError, match="'joint', 'fixmatch', 'distillation'"):
        adapter.validate_python({"kind": "mean_teacher"})


def test_new_options_leave_the_old_settings_of_a_fingerprint():
    assert settings_of(JointConfig()) == {
        "kind": "joint",
        "label_smoothing": 0.1,
        "loss_normalization": "labeled_batch",
        "unlabeled_weight": 1.0,
    }
    assert "margin" in settings_of(joint(margin=0.4))
    assert settings_of(joint(pseudo_loss={"kind": "kl"}))["pseudo_loss"] == {
        "kind": "kl",
        "temperature": 1.0,
    }
