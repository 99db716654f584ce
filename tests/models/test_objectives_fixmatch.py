"""FixMatch in one step by hand, and against the known defects of other implementations."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.architectures import SmallCnnConfig
from models.durations import Duration
from models.noise import NoiseConfig
from models.objectives import (
    Batch,
    DebiasConfig,
    FixMatchConfig,
    FixMatchObjective,
    JointConfig,
    Models,
    StepLoss,
    Stream,
    calls_teacher,
    labels_only,
    why_not_mixed,
)
from models.optimization import SGDConfig
from models.training import TrainingConfig, TrainingState, initial_state, train


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


def batch_of(num_labeled: int, num_unlabeled: int) -> Batch:
    """Labelled weak views are 0.1 throughout, unlabelled weak ones 0.2, strong ones 0.3."""

    def views(n: int, value: float) -> Tensor:
        return torch.full((n, 3, 2, 2), value)

    return Batch(
        views(num_labeled, 0.1),
        torch.zeros(num_labeled, dtype=torch.int64),
        views={
            "unlabeled_weak": views(num_unlabeled, 0.2),
            "unlabeled_strong": views(num_unlabeled, 0.3),
        },
    )


def step_loss(
    config: FixMatchConfig, logits: Tensor, num_labeled: int, state: dict[str, Tensor] | None = None
) -> tuple[StepLoss, FixedLogits]:
    """The loss of a step with the gradient left in the student."""
    objective = FixMatchObjective(config)
    student = FixedLogits(logits)
    if state is None:
        state = objective.init_state(logits.shape[1])
    batch = batch_of(num_labeled, (len(logits) - num_labeled) // 2)
    found = objective.loss(Models(student), batch, state, 0, 1)
    found.loss.backward()
    return found, student


# label 0 | weak: kept (class 0), not kept | strong: wrong about the first, right about the second
LOGITS = torch.tensor([[0.75, 0.25], [0.96, 0.04], [0.6, 0.4], [0.2, 0.8], [0.9, 0.1]]).log()


def test_a_step_by_hand():
    # labelled: -log .75 = .287682. Unlabelled: -log .2 = 1.609438 for the first, 0 for the second,
    # mean over BOTH: .804719; the mean over what is kept would be 1.609438.
    found, _ = step_loss(FixMatchConfig(unlabeled_weight=0.5), LOGITS, 1)
    assert found.logs["labeled_loss"].item() == pytest.approx(0.287682, abs=1e-6)
    assert found.logs["pseudo_loss"].item() == pytest.approx(0.804719, abs=1e-6)
    assert found.loss.item() == pytest.approx(0.287682 + 0.5 * 0.804719, abs=1e-6)
    assert found.logs["pseudo_kept"].item() == 0.5
    assert found.logs["pseudo_accuracy"].item() == 0.5
    assert found.logs["labeled_accuracy"].item() == 1.0
    assert found.statistics == {}


def test_labels_come_from_weak_views_without_gradient():
    """Peers took one network's logits on both sides, so that nothing was learnt."""
    _, student = step_loss(FixMatchConfig(), LOGITS, 1)
    gradient = student.logits.grad
    assert gradient is not None
    assert gradient[1:3].abs().max().item() == 0.0  # weak views teach only
    # strong view of the kept image: (p - q) / 2 = (.2 - 1, .8) / 2; of the other nothing
    assert gradient[3].tolist() == pytest.approx([-0.4, 0.4], abs=1e-6)
    assert gradient[4].abs().max().item() == 0.0


def test_one_forward_pass_over_all_three_kinds_of_views():
    _, student = step_loss(FixMatchConfig(), LOGITS, 1)
    (seen,) = student.seen
    assert [round(v, 1) for v in seen[:, 0, 0, 0].tolist()] == [0.1, 0.2, 0.2, 0.3, 0.3]


def test_a_probability_equal_to_the_threshold_is_kept():
    logits = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])  # weak: (.5, .5) exactly
    found, _ = step_loss(FixMatchConfig(threshold=0.5), logits, 1)
    assert found.logs["pseudo_kept"].item() == 1.0
    found, _ = step_loss(FixMatchConfig(threshold=0.5001), logits, 1)
    assert found.logs["pseudo_kept"].item() == 0.0


def test_label_smoothing_is_of_labels_and_pseudo_labels():
    found, _ = step_loss(FixMatchConfig(label_smoothing=0.2), LOGITS, 1)
    smoothed = -(0.9 * math.log(0.75) + 0.1 * math.log(0.25))
    assert found.logs["labeled_loss"].item() == pytest.approx(smoothed, abs=1e-6)
    smoothed = -(0.9 * math.log(0.2) + 0.1 * math.log(0.8)) / 2
    assert found.logs["pseudo_loss"].item() == pytest.approx(smoothed, abs=1e-6)


def test_the_parts_of_a_batch_average_to_the_whole():
    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(4 + 8 + 8, 3, generator=generator, dtype=torch.float64)
    config = FixMatchConfig(threshold=0.8, debias=DebiasConfig())
    whole, student = step_loss(config, logits, 4)
    assert student.logits.grad is not None
    assert 0 < whole.logs["pseudo_kept"].item() < 1
    found: list[StepLoss] = []
    for part in range(2):
        rows = [
            *range(part * 2, part * 2 + 2),
            *range(4 + part * 4, 8 + part * 4),
            *range(12 + part * 4, 16 + part * 4),
        ]
        half, _ = step_loss(config, logits[rows], 2)
        found.append(half)
    torch.testing.assert_close((found[0].loss + found[1].loss) / 2, whole.loss)
    mean = (found[0].statistics["class_prior"] + found[1].statistics["class_prior"]) / 2
    torch.testing.assert_close(mean, whole.statistics["class_prior"])


# ---------------------------------------------------------------------------------- debias

PRIOR = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)


def debiased(threshold: float, state: dict[str, Tensor] | None = None) -> StepLoss:
    logits = torch.tensor([[2.0, 1.0, 0.0]] * 3, dtype=torch.float64)
    config = FixMatchConfig(threshold=threshold, debias=DebiasConfig(tau=0.4, momentum=0.9))
    return step_loss(config, logits, 1, {"class_prior": PRIOR} if state is None else state)[0]


def test_debiased_labels_and_margin_match_the_golden_values():
    # softmax(z - .4 log p) = (.525776, ...), so the label is kept at .52 and not at .53 (the raw
    # .665241 would be); its loss is CE(z + .4 log p) = .250777, where the plain one is .407606
    kept = debiased(0.52)
    assert kept.logs["pseudo_kept"].item() == 1.0
    assert kept.logs["pseudo_loss"].item() == pytest.approx(0.250777, abs=1e-6)
    assert kept.logs["labeled_loss"].item() == pytest.approx(0.407606, abs=1e-6)
    assert debiased(0.53).logs["pseudo_kept"].item() == 0.0


def test_prior_averages_raw_predictions_by_class():
    # p = softmax(2, 1, 0) = (.665241, .244728, .090031), not the debiased (.525776, ...) and not a
    # scalar mean over classes, which would leave a uniform prior uniform
    objective = FixMatchObjective(FixMatchConfig(debias=DebiasConfig(tau=0.4, momentum=0.9)))
    state = objective.init_state(3)
    assert state["class_prior"].tolist() == pytest.approx([1 / 3] * 3)
    after = objective.next_state(state, debiased(0.5, state).statistics)
    expected = [0.9 / 3 + 0.1 * p for p in (0.665241, 0.244728, 0.090031)]
    assert after["class_prior"].tolist() == pytest.approx(expected, abs=1e-6)
    after = objective.next_state({"class_prior": PRIOR}, debiased(0.5).statistics)
    expected = [0.9 * 0.7 + 0.0665241, 0.9 * 0.2 + 0.0244728, 0.9 * 0.1 + 0.0090031]
    assert after["class_prior"].tolist() == pytest.approx(expected, abs=1e-6)


def test_a_planted_bias_is_taken_out_of_the_pseudo_labels():
    """A student that adds log(.7, .2, .1) to fair logits: raw labels are all head, debiased not."""
    fair = torch.tensor([[0.3, 0.0, 0.0], [0.0, 0.3, 0.0], [0.0, 0.0, 0.3]], dtype=torch.float64)
    weak = fair + PRIOR.log()
    logits = torch.cat([torch.zeros(1, 3).double(), weak, fair])
    # the strong views tell the classes apart: agreement counts the labels that are right
    plain, _ = step_loss(FixMatchConfig(threshold=0), logits, 1)
    config = FixMatchConfig(threshold=0, debias=DebiasConfig(tau=1.0))
    corrected, _ = step_loss(config, logits, 1, {"class_prior": PRIOR})
    assert plain.logs["pseudo_accuracy"].item() == pytest.approx(1 / 3)
    assert corrected.logs["pseudo_accuracy"].item() == 1.0


# ---------------------------------------------------------------------------------- in training


def training_config(**settings: Any) -> TrainingConfig:
    return TrainingConfig(
        architecture=SmallCnnConfig(width=8),
        image_size=8,
        batch_size=6,
        unlabeled_ratio=2,
        duration=Duration(steps=12),
        optimizer=SGDConfig(lr=0.05),
        noise=NoiseConfig(dropout=0.2),
        objective=FixMatchConfig(threshold=0.4, debias=DebiasConfig(momentum=0.5)),
        **settings,
    )


def next_batch(step: int, part: int = 0, num_parts: int = 1) -> Batch:
    """Class = brightest channel; strong views have more noise."""
    assert num_parts == 1
    generator = torch.Generator().manual_seed(50 + step)

    def noised(labels: Tensor, amount: float) -> Tensor:
        images = torch.rand((len(labels), 3, 8, 8), generator=generator) * amount
        images[torch.arange(len(labels)), labels] += 0.3
        return images

    labels = torch.randint(3, (6,), generator=generator)
    hidden = torch.randint(3, (12,), generator=generator)
    views = {"unlabeled_weak": noised(hidden, 0.3), "unlabeled_strong": noised(hidden, 0.6)}
    return Batch(noised(labels, 0.3), labels, views=views)


def run(state: TrainingState, until: int = 12) -> list[dict[str, float]]:
    logs: list[dict[str, float]] = []
    for report in train(
        state, training_config(), next_batch, total_steps=12, num_labeled=60, layer_seed=1
    ):
        logs.append(report.logs)
        if report.step == until:
            break
    return logs


def fresh(seed: int = 0) -> TrainingState:
    return initial_state(training_config(), 3, seed=seed, device="cpu")


def test_training_learns_and_moves_the_prior():
    state = fresh()
    logs = run(state)
    assert logs[-1]["labeled_loss"] < 0.7 * logs[0]["labeled_loss"]
    assert logs[-1]["pseudo_kept"] > logs[0]["pseudo_kept"]
    prior = state.objective_state["class_prior"]
    assert prior.sum().item() == pytest.approx(1.0)
    assert (prior - 1 / 3).abs().max().item() > 1e-3


@pytest.mark.parametrize("loses_the_prior", [False, True])
def test_resume_is_exact_and_needs_the_prior(loses_the_prior: bool):
    straight, stopped, resumed = fresh(), fresh(), fresh(seed=9)
    run(straight)
    run(stopped, until=5)
    resumed.restore(stopped.tensors(), stopped.scalars())
    if loses_the_prior:
        resumed.objective_state = fresh().objective_state
    run(resumed)
    expected, found = straight.tensors(), resumed.tensors()
    same = all(torch.equal(found[name], value) for name, value in expected.items())
    assert same is not loses_the_prior


# ---------------------------------------------------------------------------------- config


def test_streams_ask_for_no_selection_and_for_two_views():
    objective = FixMatchObjective(FixMatchConfig())
    assert objective.streams(Sizes(8, 7)) == (
        Stream("labeled", 8, views=("weak",)),
        Stream("unlabeled", 56, views=("weak", "strong")),
    )
    with pytest.raises(ValueError, match="FixMatch uses 7"):
        objective.streams(Sizes(8, 0))


def test_what_a_training_needs_to_know_of_it():
    config = FixMatchConfig(label_smoothing=0.05)
    assert not calls_teacher(config)
    assert labels_only(config) == JointConfig(label_smoothing=0.05)
    assert why_not_mixed(config, "mixup") is not None
    assert why_not_mixed(JointConfig(), "mixup") is None
    assert why_not_mixed(JointConfig(tsa="log"), "mixup") == (
        "objective.tsa compares the student with the one label of an image"
    )
