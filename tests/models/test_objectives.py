"""Losses against values worked by hand."""

import math
from dataclasses import dataclass

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from models.objectives import (
    Batch,
    JointConfig,
    JointObjective,
    Models,
    Stream,
    smooth_labels,
    soft_cross_entropy,
)
from models.objectives.normalization import LossNormalization, combine_losses


@dataclass(frozen=True)
class Sizes:
    batch_size: int
    unlabeled_ratio: int


class FixedLogits(nn.Module):
    """Answers with given logits and counts the forward passes."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.num_calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.num_calls += 1
        assert len(images) == len(self.logits)
        return self.logits


def images(n: int) -> Tensor:
    return torch.zeros(n, 3, 2, 2)


def loss_of(batch: Batch, logits: Tensor, config: JointConfig) -> tuple[Tensor, dict[str, Tensor]]:
    objective = JointObjective(config)
    assert objective.init_state(logits.shape[1]) == {}
    found = objective.loss(Models(FixedLogits(logits)), batch, {}, 0, 1)
    assert objective.next_state({}, found.statistics) == {}
    return found.loss, found.logs


@pytest.mark.parametrize(
    ("normalization", "expected"), [("labeled_batch", 7.0), ("concat_mean", 1.75)]
)
def test_loss_normaliser_matches_the_golden_values(
    normalization: LossNormalization, expected: float
):
    # mean losses 1 and 2 on batches of 4 and 12: (4 + 24) / 4 and (4 + 24) / 16
    labeled, pseudo = torch.full((4,), 1.0), torch.full((12,), 2.0)
    assert combine_losses(labeled, pseudo, normalization, weight=1, state={}).item() == expected


def test_normalisers_differ_by_exactly_one_plus_the_ratio():
    labeled, pseudo = torch.rand(4), torch.rand(12)
    released = combine_losses(labeled, pseudo, "labeled_batch", weight=1, state={})
    prose = combine_losses(labeled, pseudo, "concat_mean", weight=1, state={})
    assert (released / prose).item() == pytest.approx(4.0)


def test_label_smoothing_is_tensorflows():
    smoothed = smooth_labels(torch.eye(10)[:1], 0.1)[0].tolist()
    assert smoothed == pytest.approx([0.91] + [0.01] * 9)


def test_gradient_of_soft_cross_entropy_is_p_minus_q():
    logits = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float32, requires_grad=True)
    q = torch.tensor([[0.2, 0.5, 0.3]])
    soft_cross_entropy(logits, q).sum().backward()
    # p = softmax(2, 1, 0) = (.665241, .244728, .090031)
    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx([0.465241, -0.255272, -0.209969], abs=1e-6)


def test_a_models_own_prediction_as_target_gives_no_gradient():
    logits = torch.tensor([[2.0, 1.0, 0.0]], requires_grad=True)
    soft_cross_entropy(logits, logits.softmax(dim=1)).sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().max().item() < 1e-7


def test_labels_are_smoothed_and_soft_pseudo_labels_are_not():
    # uniform logits: any target costs log 2, so use skewed ones: log p = (log .75, log .25)
    logits = torch.log(torch.tensor([[0.75, 0.25], [0.75, 0.25]]))
    batch = Batch(images(2), torch.tensor([0]), torch.tensor([[1.0, 0.0]]))
    _, logs = loss_of(batch, logits, JointConfig(label_smoothing=0.2))
    smoothed = -(0.9 * math.log(0.75) + 0.1 * math.log(0.25))
    assert logs["labeled_loss"].item() == pytest.approx(smoothed, abs=1e-6)
    assert logs["pseudo_loss"].item() == pytest.approx(-math.log(0.75), abs=1e-6)
    hard = Batch(images(2), batch.labels, batch.pseudo_targets, pseudo_is_hard=True)
    _, logs = loss_of(hard, logits, JointConfig(label_smoothing=0.2))
    assert logs["pseudo_loss"].item() == pytest.approx(smoothed, abs=1e-6)


def test_a_weight_of_zero_counts_like_a_loss_of_zero():
    logits = torch.zeros(3, 2)
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    weighted = Batch(images(3), torch.tensor([1]), targets, torch.tensor([0.5, 0.0]))
    loss, _ = loss_of(weighted, logits, JointConfig(loss_normalization="concat_mean"))
    # every loss is log 2: (1 + 0.5 + 0) / 3
    assert loss.item() == pytest.approx(0.5 * math.log(2), abs=1e-6)


def test_unlabeled_weight_scales_only_the_pseudo_labelled_loss():
    logits = torch.zeros(3, 2)
    batch = Batch(images(3), torch.tensor([1]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    loss, logs = loss_of(batch, logits, JointConfig(unlabeled_weight=0.25))
    assert loss.item() == pytest.approx(1.5 * math.log(2), abs=1e-6)  # 1 + 0.25 * 2
    assert logs["pseudo_loss"].item() == pytest.approx(math.log(2), abs=1e-6)


def test_labels_alone_give_their_mean_under_both_normalisers():
    logits = torch.zeros(4, 2)
    batch = Batch(images(4), torch.tensor([0, 1, 1, 0]))
    for normalization in ("labeled_batch", "concat_mean"):
        config = JointConfig.model_validate({"loss_normalization": normalization})
        loss, logs = loss_of(batch, logits, config)
        assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
        assert set(logs) == {"labeled_loss", "labeled_accuracy"}


def test_one_forward_pass_sees_both_streams():
    model = FixedLogits(torch.zeros(4, 2))
    batch = Batch(images(4), torch.tensor([0]), torch.full((3, 2), 0.5))
    JointObjective(JointConfig()).loss(Models(model), batch, {}, 0, 1)
    assert model.num_calls == 1


def test_logs_hold_accuracy_and_agreement():
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    batch = Batch(images(4), torch.tensor([0, 1]), torch.tensor([[0.6, 0.4], [0.3, 0.7]]))
    _, logs = loss_of(batch, logits, JointConfig())
    assert logs["labeled_accuracy"].item() == 0.5
    assert logs["pseudo_accuracy"].item() == 1.0


def test_streams_are_declared_with_their_sizes():
    objective = JointObjective(JointConfig())
    assert objective.streams(Sizes(8, 3)) == (
        Stream("labeled", 8),
        Stream("pseudo_labeled", 24, with_selection=True),
    )
    assert objective.streams(Sizes(8, 0)) == (Stream("labeled", 8),)


def test_batches_whose_sizes_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="images must be labels"):
        Batch(images(3), torch.tensor([0]))
    with pytest.raises(ValueError, match="pseudo_weights of shape"):
        Batch(images(3), torch.tensor([0]), torch.zeros(2, 2), torch.ones(3))
    with pytest.raises(ValueError, match=r"dtype torch\.uint8"):
        Batch(images(1).to(torch.uint8), torch.tensor([0]))


def test_unknown_options_are_refused():
    with pytest.raises(ValidationError, match="clip"):
        JointConfig.model_validate({"clip": 1})
