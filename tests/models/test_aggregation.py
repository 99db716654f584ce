"""One prediction from several members: golden values, and which axis a deviation is over."""

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from models.aggregation import (
    Aggregate,
    McDropoutConfig,
    NoUncertaintyConfig,
    TeachersUncertaintyConfig,
    UncertaintyConfig,
    ViewsUncertaintyConfig,
    combine,
    mean_prediction,
)

TWO = [[0.8, 0.2], [0.4, 0.6]]


def members(probs: Sequence[Sequence[float]]) -> tuple[Tensor, Tensor]:
    """Of one image: (M, 1, C) and (M, 1), with another logsumexp for each member."""
    log_probs = torch.tensor(probs, dtype=torch.float64).log()[:, None]
    return log_probs, torch.arange(len(probs), dtype=torch.float64)[:, None]


def as_axis(values: Tensor, axis: int) -> Tensor:
    """(M, ...) -> (T, V, P, ...) with all members along one axis."""
    for i in range(3):
        if i != axis:
            values = values.unsqueeze(i)
    return values


def test_mean_prob_is_the_mean_of_the_probabilities():
    # (.8 + .4) / 2 and (.2 + .6) / 2; the logsumexps are 0 and 1.
    log_probs, log_sums = mean_prediction(*members(TWO), "mean_prob")
    assert log_probs.exp().flatten().tolist() == pytest.approx([0.6, 0.4])
    assert log_sums.tolist() == [0.5]


def test_mean_logit_is_the_normalised_geometric_mean():
    # sqrt(.8 * .4) = .565685, sqrt(.2 * .6) = .346410; over their sum .912096: .620204, .379796
    log_probs, _ = mean_prediction(*members(TWO), "mean_logit")
    assert log_probs.exp().flatten().tolist() == pytest.approx([0.620204, 0.379796], abs=1e-6)


def test_log_probs_and_logsumexp_of_mean_logits_add_up_to_the_mean_logits():
    log_probs, log_sums = members(TWO)
    mean = (log_probs + log_sums[..., None]).mean(0)
    combined, total = mean_prediction(log_probs, log_sums, "mean_logit")
    torch.testing.assert_close(combined + total[..., None], mean)


def test_a_sure_member_outvotes_two_by_logits_and_not_by_probabilities():
    # Probabilities: (.999 + .2 + .2) / 3 = .4663. Logits: (ln 999 + 2 ln .25) / 3 = 1.378 > 0.
    log_probs, log_sums = members([[0.999, 0.001], [0.2, 0.8], [0.2, 0.8]])
    by_prob, _ = mean_prediction(log_probs, log_sums, "mean_prob")
    by_logit, _ = mean_prediction(log_probs, log_sums, "mean_logit")
    assert by_prob.exp()[0, 0].item() == pytest.approx(0.466333, abs=1e-6)
    assert (by_logit[0, 0] - by_logit[0, 1]).item() == pytest.approx(1.378056, abs=1e-6)


def test_improbable_classes_keep_their_logarithms():
    # Each probability is 0 in float32: exp(-200). Their mean in log space is exp(-200) still.
    rest = torch.log1p(torch.tensor(-math.exp(-200)))
    log_probs = torch.stack((rest, torch.tensor(-200.0))).expand(3, 1, 2)
    combined, _ = mean_prediction(log_probs, torch.zeros(3, 1), "mean_prob")
    assert combined[0, 1].item() == pytest.approx(-200, abs=1e-4)


@pytest.mark.parametrize("aggregate", ["mean_prob", "mean_logit"])
def test_the_order_of_members_does_not_matter(aggregate: Aggregate):
    log_probs = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    log_sums = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    expected = mean_prediction(log_probs, log_sums, aggregate)
    for order in itertools.permutations(range(4)):
        moved = list(order)
        found = mean_prediction(log_probs[moved], log_sums[moved], aggregate)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("aggregate", ["mean_prob", "mean_logit"])
def test_one_member_is_left_as_it_is(aggregate: Aggregate):
    log_probs = torch.tensor([[[0.5, 0.3, 0.2]]]).log()
    found, sums = mean_prediction(log_probs, torch.tensor([[2.0]]), aggregate)
    torch.testing.assert_close(found, log_probs[0])
    torch.testing.assert_close(sums, torch.tensor([2.0]))


@pytest.mark.parametrize(
    ("uncertainty", "axis"),
    [(TeachersUncertaintyConfig(), 0), (ViewsUncertaintyConfig(), 1), (McDropoutConfig(), 2)],
)
def test_uncertainty_is_the_sample_deviation_of_the_predicted_class(
    uncertainty: UncertaintyConfig, axis: int
):
    # Class 0 is predicted (.6): .8 and .4 lie .2 off, sqrt((.04 + .04) / (2 - 1)) = .282843.
    log_probs, log_sums = (as_axis(one, axis) for one in members(TWO))
    found = combine(log_probs, log_sums, aggregate="mean_prob", uncertainty=uncertainty)
    assert found.uncertainty is not None
    assert found.uncertainty.tolist() == pytest.approx([0.282843], abs=1e-6)


def test_uncertainty_over_passes_is_of_what_the_views_give_together():
    # Two views of two passes, one image. Pass 1: (.9 + .7) / 2 = .8, pass 2: (.5 + .7) / 2 = .6;
    # .1 off each, so sqrt(.02) = .141421. Over views: (.9 + .5) / 2 = (.7 + .7) / 2, so 0.
    probs = torch.tensor([[0.9, 0.5], [0.7, 0.7]], dtype=torch.float64)  # (V, P)
    log_probs = torch.stack((probs, 1 - probs), dim=-1).log()[None, :, :, None]  # (T, V, P, B, C)
    log_sums = torch.zeros(1, 2, 2, 1, dtype=torch.float64)
    over = {
        config.kind: combine(log_probs, log_sums, aggregate="mean_prob", uncertainty=config)
        for config in (McDropoutConfig(passes=2), ViewsUncertaintyConfig())
    }
    for kind, expected in (("mc_dropout", 0.141421), ("views", 0.0)):
        spread = over[kind].uncertainty
        assert spread is not None
        assert spread.tolist() == pytest.approx([expected], abs=1e-6)


def test_equal_members_have_no_deviation_and_agree():
    log_probs, log_sums = (as_axis(one, 1) for one in members([[0.7, 0.3]] * 3))
    found = combine(
        log_probs, log_sums, aggregate="mean_prob", uncertainty=ViewsUncertaintyConfig()
    )
    assert found.uncertainty is not None
    assert found.uncertainty.tolist() == pytest.approx([0.0], abs=1e-12)
    assert found.agreement.tolist() == [1.0]


def test_agreement_is_the_share_of_members_that_vote_for_the_label():
    # Mean (.55, .45): class 0, for which two of three vote.
    probs = [[0.6, 0.4], [0.6, 0.4], [0.45, 0.55]]
    log_probs, log_sums = (as_axis(one, 0) for one in members(probs))
    found = combine(log_probs, log_sums, aggregate="mean_prob", uncertainty=NoUncertaintyConfig())
    assert found.uncertainty is None
    assert found.agreement.tolist() == pytest.approx([2 / 3])


def test_a_deviation_of_one_member_is_refused():
    log_probs, log_sums = (as_axis(one, 0) for one in members(TWO))
    with pytest.raises(ValueError, match="uncertainty=views is a standard deviation"):
        combine(log_probs, log_sums, aggregate="mean_prob", uncertainty=ViewsUncertaintyConfig())
