"""Distillation with a teacher in training: golden values, and that both see the same images."""

import math
from dataclasses import dataclass

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from models.mixing import mix_batch
from models.noise.mixup import MixupConfig
from models.objectives import (
    Batch,
    DistillationConfig,
    DistillationObjective,
    JointConfig,
    Models,
    StepLoss,
    Stream,
    calls_teacher,
    labels_only,
    why_not_mixed,
)


@dataclass(frozen=True)
class Sizes:
    batch_size: int
    unlabeled_ratio: int


class Recorder(nn.Module):
    """Answers every image with the same logits and keeps what it was asked."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits, dtype=torch.float64))
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images)
        return self.logits.expand(len(images), -1)


def batch_of(labels: list[int], num_unlabeled: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(
        torch.rand((len(labels), 3, 4, 4), generator=generator),
        torch.tensor(labels, dtype=torch.int64),
        views={"unlabeled_strong": torch.rand((num_unlabeled, 3, 4, 4), generator=generator)},
    )


def step_loss(
    config: DistillationConfig, student: nn.Module, teacher: nn.Module | None, batch: Batch
) -> StepLoss:
    return DistillationObjective(config).loss(Models(student, teacher), batch, {}, 0, 1)


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 0.574346), (4.0, 0.807711)])
def test_divergence_matches_the_golden_values(temperature: float, expected: float):
    # z_t = (3, 1, 0), z_s = (1, 1, 1): T^2 KL(softmax(z_t / T) || softmax(z_s / T))
    student, teacher = Recorder([1.0, 1.0, 1.0]), Recorder([3.0, 1.0, 0.0]).eval()
    config = DistillationConfig(temperature=temperature)
    found = step_loss(config, student, teacher, batch_of([], 2))
    assert found.loss.item() == pytest.approx(expected, abs=1e-6)
    assert set(found.logs) == {"pseudo_loss", "pseudo_accuracy"}
    found.loss.backward()
    assert student.logits.grad is not None
    assert student.logits.grad.abs().max().item() > 0.1
    assert teacher.logits.grad is None


def test_a_student_that_agrees_has_nothing_to_learn():
    """And only then: peers that took the student's logits for the teacher's had loss 0 always."""
    student = Recorder([3.0, 1.0, 0.0])
    found = step_loss(DistillationConfig(), student, student.eval(), batch_of([], 2))
    assert found.loss.item() == pytest.approx(0.0, abs=1e-12)
    other = step_loss(
        DistillationConfig(), student, Recorder([0.0, 1.0, 3.0]).eval(), batch_of([], 2)
    )
    assert other.loss.item() > 1.0


def test_student_and_teacher_see_the_same_images():
    student, teacher = Recorder([1.0, 1.0]), Recorder([3.0, 1.0]).eval()
    batch = batch_of([], 4)
    step_loss(DistillationConfig(), student, teacher, batch)
    assert torch.equal(student.seen[0], batch.views["unlabeled_strong"])
    assert torch.equal(teacher.seen[0], student.seen[0])


def test_student_and_teacher_see_the_same_mixtures():
    """Function matching: the teacher answers for the mixture, nothing is mixed afterwards."""
    student, teacher = Recorder([1.0, 1.0]), Recorder([3.0, 1.0]).eval()
    batch = batch_of([], 6)
    mixed = mix_batch(batch, MixupConfig(alpha=1.0), seed=1, label_smoothing=0.0, num_classes=2)
    step_loss(DistillationConfig(), student, teacher, mixed)
    assert torch.equal(teacher.seen[0], student.seen[0])
    assert not torch.equal(student.seen[0], batch.views["unlabeled_strong"])


def test_labels_have_their_share():
    # 1/4 of -log .5 for the label (student uniform over two), 3/4 of KL((.75, .25) || uniform)
    student, teacher = Recorder([0.0, 0.0]), Recorder([math.log(3), 0.0]).eval()
    config = DistillationConfig(label_share=0.25)
    found = step_loss(config, student, teacher, batch_of([0, 1, 1], 2))
    divergence = math.log(2) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    assert found.logs["pseudo_loss"].item() == pytest.approx(divergence)
    assert found.logs["labeled_loss"].item() == pytest.approx(math.log(2))
    assert found.loss.item() == pytest.approx(0.75 * divergence + 0.25 * math.log(2))
    assert len(student.seen) == 1
    assert len(student.seen[0]) == 5
    assert len(teacher.seen[0]) == 2


def test_mixed_labels_are_targets_as_they_are():
    student, teacher = Recorder([math.log(3), 0.0]), Recorder([math.log(3), 0.0]).eval()
    batch = batch_of([1], 1)
    mixed = Batch(
        batch.images, batch.labels, label_targets=torch.tensor([[0.6, 0.4]]), views=batch.views
    )
    config = DistillationConfig(label_share=0.5, label_smoothing=0.1)
    found = step_loss(config, student, teacher, mixed)
    expected = -(0.6 * math.log(0.75) + 0.4 * math.log(0.25))
    assert found.logs["labeled_loss"].item() == pytest.approx(expected)
    # The student says 0, of which the mixture has most, though the image was labelled 1.
    assert found.logs["labeled_accuracy"].item() == 1.0


def test_a_student_learns_the_function_of_its_teacher():
    generator = torch.Generator().manual_seed(4)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        teacher = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).eval()
        student = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    losses: list[float] = []
    for _ in range(60):
        batch = Batch(
            torch.zeros(0, 3, 4, 4),
            torch.zeros(0, dtype=torch.int64),
            views={"unlabeled_strong": torch.rand((16, 3, 4, 4), generator=generator)},
        )
        found = step_loss(DistillationConfig(temperature=2.0), student, teacher, batch)
        optimizer.zero_grad()
        found.loss.backward()
        optimizer.step()
        losses.append(found.loss.item())
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("teacher", [None, "training"])
def test_a_missing_or_noisy_teacher_is_refused(teacher: str | None):
    given = None if teacher is None else Recorder([1.0, 0.0]).train()
    with pytest.raises(ValueError, match="frozen and in evaluation mode"):
        step_loss(DistillationConfig(), Recorder([0.0, 0.0]), given, batch_of([], 2))


def test_streams_read_labels_only_where_they_have_a_share():
    unlabeled = Stream("unlabeled", 24, views=("strong",))
    objective = DistillationObjective(DistillationConfig())
    assert objective.streams(Sizes(8, 3)) == (unlabeled,)
    objective = DistillationObjective(DistillationConfig(label_share=0.1))
    assert objective.streams(Sizes(8, 3)) == (Stream("labeled", 8), unlabeled)
    with pytest.raises(ValueError, match="no unlabelled images"):
        objective.streams(Sizes(8, 0))


def test_what_a_training_needs_to_know_of_it():
    assert calls_teacher(DistillationConfig())
    assert labels_only(DistillationConfig()) == JointConfig(label_smoothing=0.0)
    assert why_not_mixed(DistillationConfig(), "mixup") is None
    assert why_not_mixed(DistillationConfig(), "manifold_mixup") is not None


def test_smoothing_of_labels_that_are_not_read_is_refused():
    with pytest.raises(ValidationError, match="label_share=0 smooths nothing"):
        DistillationConfig(label_smoothing=0.1)
