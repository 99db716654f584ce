"""Mixing: pairs of images and soft targets, boxes, confidences and hidden states."""

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from models.architectures import SmallCnnConfig
from models.architectures.classifier import Classifier, Normalization
from models.durations import Duration
from models.mixing import mix_batch, mixed, mixing_forward
from models.noise import NoiseConfig
from models.noise.beta import WORDS_PER_GAMMA, beta_draws, dirichlet_draws
from models.noise.cutmix import CutMixConfig, cutmix_boxes, kept_shares, paste
from models.noise.manifold_mixup import ManifoldMixupConfig
from models.noise.mixing import MixingConfig, MixupOrCutMixConfig, draw_pairs
from models.noise.mixup import MixupConfig, mix_rows
from models.noise.prob_pseudo_mixup import (
    ProbPseudoMixupConfig,
    confidence_shares,
    mixed_confidences,
)
from models.objectives import Batch, FixMatchConfig
from models.training import TrainingConfig, initial_state, train

_CONFIGS: tuple[Any, ...] = (
    MixupConfig(),
    CutMixConfig(),
    MixupOrCutMixConfig(),
    ProbPseudoMixupConfig(cutmix_share=0.5),
    ManifoldMixupConfig(layers=("input",)),
)


def _batch(
    num_labeled: int = 4, num_pseudo: int = 6, *, is_hard: bool = False, **changes: Any
) -> Batch:
    """Image i is constant i / B, so that a blended pixel tells which images are in it."""
    generator = torch.Generator().manual_seed(num_labeled * 100 + num_pseudo)
    count = num_labeled + num_pseudo
    levels = torch.arange(count).float() / count
    targets = torch.rand(num_pseudo, 3, generator=generator).softmax(1)
    if is_hard:
        targets = torch.eye(3)[targets.argmax(1)]
    fields: dict[str, Any] = {
        "images": levels.view(-1, 1, 1, 1).expand(count, 3, 8, 8).clone(),
        "labels": torch.arange(num_labeled) % 3,
        "pseudo_targets": targets,
        "pseudo_is_hard": is_hard,
        "pseudo_confidences": targets.amax(1),
    }
    return Batch(**(fields | changes))


def _mix(batch: Batch, config: MixingConfig, *, seed: int = 3, smoothing: float = 0.0) -> Batch:
    return mix_batch(batch, config, seed=seed, label_smoothing=smoothing, num_classes=3)


def _pairs(batch: Batch, config: MixingConfig, *, seed: int = 3) -> Any:
    return draw_pairs(
        config,
        seed=seed,
        num_labeled=len(batch.labels),
        confidences=batch.pseudo_confidences,
        num_rows=len(batch.images),
        size=(8, 8),
    )


def _all_targets(batch: Batch) -> Tensor:
    assert batch.label_targets is not None
    assert batch.pseudo_targets is not None
    return torch.cat((batch.label_targets, batch.pseudo_targets))


# Draws.


@pytest.mark.parametrize("alpha", [0.2, 1.0, 2.0, 8.0])
def test_beta_draws_have_the_moments_of_the_beta_distribution(alpha: float) -> None:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 1 << 32, (200_000, 2 * WORDS_PER_GAMMA), generator=generator)
    draws = beta_draws(words, alpha)
    assert float(draws.min()) >= 0
    assert float(draws.max()) <= 1
    # Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1)); kurtosis below 3, so 5 sigma of the variance
    # are at most 5 * sqrt(2 / 200000) of it = 1.6 %
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(float(draws.mean()) - 0.5) < 5 * (variance / 200_000) ** 0.5
    assert abs(float(draws.var()) / variance - 1) < 0.016


def test_beta_with_alpha_1_is_uniform() -> None:
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(0, 1 << 32, (100_000, 2 * WORDS_PER_GAMMA), generator=generator)
    ordered = beta_draws(words, 1.0).sort().values
    grid = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) = .0062 is exceeded once in 1,000
    assert float((ordered - grid).abs().max()) < 0.0062


def test_a_tiny_alpha_gives_0_or_1_and_never_nan() -> None:
    generator = torch.Generator().manual_seed(2)
    words = torch.randint(0, 1 << 32, (1000, 2 * WORDS_PER_GAMMA), generator=generator)
    draws = beta_draws(words, 0.001)
    assert float(torch.minimum(draws, 1 - draws).max()) < 0.5
    assert 400 < int((draws > 0.5).sum()) < 600


def test_dirichlet_rows_sum_to_1_with_the_mean_and_variance_of_the_distribution() -> None:
    generator = torch.Generator().manual_seed(3)
    words = torch.randint(0, 1 << 32, (100_000, 3 * WORDS_PER_GAMMA), generator=generator)
    draws = dirichlet_draws(words, 1.0, 3)
    assert torch.allclose(draws.sum(1), torch.ones(100_000, dtype=torch.float64))
    # Dirichlet(1, 1, 1): mean 1/3, variance (1/3)(2/3)/4 = 1/18, covariance -1/36
    assert torch.allclose(draws.mean(0), torch.full((3,), 1 / 3, dtype=torch.float64), atol=0.004)
    assert torch.allclose(draws.var(0), torch.full((3,), 1 / 18, dtype=torch.float64), rtol=0.03)
    assert abs(float(torch.cov(draws.T)[0, 1]) + 1 / 36) < 0.001


# mixup.


def test_mixup_is_the_weighted_mean_of_images_and_of_targets() -> None:
    images = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 2, 2)
    partners, lam = torch.tensor([1, 0]), torch.tensor([0.7, 0.7])
    mixed_images = mix_rows(images, partners, lam)
    # .7 * 0 + .3 * 1 and .7 * 1 + .3 * 0
    assert torch.allclose(mixed_images[:, 0, 0, 0], torch.tensor([0.3, 0.7]))
    targets = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.2, 0.8]])
    # .7 * (.5, .5, 0) + .3 * (0, .2, .8): argmax after mixing would give a one-hot row
    expected = torch.tensor([[0.35, 0.41, 0.24], [0.15, 0.29, 0.56]])
    assert torch.allclose(mix_rows(targets, partners, lam), expected)


def test_mixup_with_lambda_1_changes_no_bit() -> None:
    rows = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mix_rows(rows, torch.tensor([4, 3, 2, 1, 0]), torch.ones(5)), rows)


def test_targets_are_mixed_as_images_are_over_labelled_and_pseudo_labelled_rows() -> None:
    batch = _batch(40, 60)
    out = _mix(batch, MixupConfig(alpha=1.0))
    pairs = _pairs(batch, MixupConfig(alpha=1.0))
    levels = batch.images[:, 0, 0, 0]
    expected = pairs.lam * levels + (1 - pairs.lam) * levels[pairs.partners]
    assert torch.allclose(out.images[:, 0, 0, 0].double(), expected)
    one_hot = torch.nn.functional.one_hot(batch.labels, 3).float()
    assert batch.pseudo_targets is not None
    before = torch.cat((one_hot, batch.pseudo_targets)).double()
    lam = pairs.lam[:, None]
    assert torch.allclose(
        _all_targets(out).double(), lam * before + (1 - lam) * before[pairs.partners], atol=1e-6
    )
    # rows of both kinds are partners of both kinds
    is_pseudo = torch.arange(100) >= 40
    assert set(zip(is_pseudo.tolist(), is_pseudo[pairs.partners].tolist(), strict=True)) == {
        (False, False),
        (False, True),
        (True, False),
        (True, True),
    }
    assert len(set(pairs.lam.tolist())) == 1  # one lambda a batch, as released


@pytest.mark.parametrize("config", _CONFIGS)
def test_mixed_targets_are_distributions_and_never_hard(config: Any) -> None:
    for seed in range(5):
        batch = _batch(is_hard=True)
        out = _mix(batch, config, seed=seed, smoothing=0.1)
        targets = _all_targets(out)
        assert torch.allclose(targets.sum(1), torch.ones(10))
        assert float(targets.min()) >= 0.1 / 3 - 1e-6  # hard ones were smoothed
        assert not out.pseudo_is_hard
        assert float(out.images.min()) >= 0
        assert float(out.images.max()) <= 1


def test_soft_targets_are_not_smoothed_and_labels_are() -> None:
    # lambda is 1 in a batch that is not mixed
    config = MixupConfig(prob=1e-9)
    soft, hard = _batch(), _batch(is_hard=True)
    out = _mix(soft, config, smoothing=0.3)
    assert out.pseudo_targets is not None
    assert soft.pseudo_targets is not None
    assert torch.equal(out.pseudo_targets, soft.pseudo_targets)
    assert out.label_targets is not None
    # .7 + .3 / 3 on the label, .1 elsewhere
    assert torch.allclose(out.label_targets[0], torch.tensor([0.8, 0.1, 0.1]))
    out = _mix(hard, config, smoothing=0.3)
    assert out.pseudo_targets is not None
    assert torch.allclose(out.pseudo_targets.amax(1), torch.full((6,), 0.8))
    assert torch.equal(out.images, hard.images)


@pytest.mark.parametrize("config", _CONFIGS)
def test_mixing_depends_on_the_seed_and_on_no_global_generator(config: Any) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = _mix(_batch(), config)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    again = _mix(_batch(), config)
    assert torch.equal(first.images, again.images)
    assert torch.equal(_all_targets(first), _all_targets(again))
    assert not torch.equal(_all_targets(_mix(_batch(), config, seed=4)), _all_targets(first))


def test_a_batch_is_mixed_with_its_probability() -> None:
    is_mixed = [
        bool(float(_pairs(_batch(), MixupConfig(prob=0.3), seed=seed).lam[0]) < 1)
        for seed in range(400)
    ]
    # 120; sigma = sqrt(400 * .3 * .7) = 9.2; 5 sigma = 46
    assert abs(sum(is_mixed) - 120) < 46


# Weights.


def test_a_mixed_row_weighs_as_its_images_do_and_cross_entropy_is_the_weighted_sum() -> None:
    # Broken variant: mixing targets by lambda and weights apart, which lets a pseudo-label of
    # weight 0 into its partner's target.
    weights = torch.tensor([0.0, 0.5, 1.0, 2.0, 0.25, 0.0])
    batch = _batch(pseudo_weights=weights)
    config = MixupConfig()
    out, pairs = _mix(batch, config), _pairs(batch, config)
    assert out.pseudo_weights is not None
    assert out.label_targets is not None
    w = torch.cat((torch.ones(4), weights)).double()
    assert torch.allclose(
        out.pseudo_weights.double(), (pairs.lam * w + (1 - pairs.lam) * w[pairs.partners])[4:]
    )
    assert batch.pseudo_targets is not None
    before = torch.cat((torch.eye(3)[batch.labels], batch.pseudo_targets)).double()
    logits = torch.randn(10, 3, generator=torch.Generator().manual_seed(0)).double()
    log_p = logits.log_softmax(1)
    own = -(before * log_p).sum(1) * w
    other = -(before[pairs.partners] * log_p).sum(1) * w[pairs.partners]
    expected = (pairs.lam * own + (1 - pairs.lam) * other)[4:]
    assert out.pseudo_targets is not None
    found = -(out.pseudo_targets.double() * log_p[4:]).sum(1) * out.pseudo_weights.double()
    assert torch.allclose(found, expected, atol=1e-6)
    # a labelled row with a partner of weight 0 keeps its label whole
    for row in range(4):
        if w[pairs.partners[row]] == 0:
            assert torch.equal(out.label_targets[row], torch.eye(3)[batch.labels[row]])


# CutMix.


def test_cutmix_boxes_and_shares_match_values_worked_by_hand() -> None:
    # lambda .75 at 32 x 32: side int(32 * sqrt(.25)) = 16, half 8. Centre (16, 16): 8..24 both
    # ways, 256 / 1024 covered. Centre (0, 0): 0..8 both ways, 64 / 1024. Centre y 0, x 16:
    # 8 * 16 / 1024.
    half_range, zero = 1 << 31, 0
    words = torch.tensor([[half_range, half_range], [zero, zero], [zero, half_range]])
    boxes = cutmix_boxes(words, torch.full((3,), 0.75), 32, 32)
    assert boxes.tolist() == [[8, 8, 24, 24], [0, 0, 8, 8], [8, 0, 24, 8]]
    # Broken variant: using .75 for the two that the border clips.
    assert kept_shares(boxes, 32, 32).tolist() == [0.75, 0.9375, 0.875]


def test_cutmix_targets_have_the_share_of_the_pixels_that_are_really_left() -> None:
    # Broken variant: lambda as drawn instead of recomputed from the clipped box.
    clipped = 0
    for seed in range(40):
        batch = _batch(is_hard=True)
        pairs = _pairs(batch, CutMixConfig(), seed=seed)
        out = _mix(batch, CutMixConfig(), seed=seed)
        changed = (out.images != batch.images)[:, 0].float().mean((1, 2))
        has_other = pairs.partners != torch.arange(10)
        assert torch.allclose(changed[has_other].double(), 1 - pairs.lam[has_other])
        left, top, right, bottom = pairs.boxes[0].tolist()
        clipped += left == 0 or top == 0 or right == 8 or bottom == 8
    assert clipped > 5  # the border was met


def test_pasting_takes_the_partners_pixels_at_the_same_place() -> None:
    images = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5).float()
    boxes = torch.tensor([[1, 0, 3, 2], [0, 0, 0, 0]])
    out = paste(images, images.flip(0), boxes)
    expected = images.clone()
    expected[0, :, 0:2, 1:3] = images[1, :, 0:2, 1:3]
    assert torch.equal(out, expected)


def test_mixup_or_cutmix_takes_each_for_its_share_of_batches() -> None:
    config = MixupOrCutMixConfig(cutmix_share=0.25)
    is_cut = [_pairs(_batch(), config, seed=seed).boxes is not None for seed in range(400)]
    # 100; sigma = sqrt(400 * .25 * .75) = 8.7; 5 sigma = 43
    assert abs(sum(is_cut) - 100) < 43


# Probabilistic pseudo-mixup.


def test_confidences_set_lambda_and_the_larger_one_stays() -> None:
    confidences, partners = torch.tensor([0.9, 0.6, 0.0, 0.0]), torch.tensor([1, 0, 3, 2])
    # .9 / 1.5 = .6, .6 / 1.5 = .4, and two zeros share equally
    assert torch.allclose(
        confidence_shares(confidences, partners),
        torch.tensor([0.6, 0.4, 0.5, 0.5], dtype=torch.float64),
    )
    assert mixed_confidences(confidences, partners).tolist() == pytest.approx([0.9, 0.9, 0, 0])


def test_prob_pseudo_mixup_keeps_labelled_and_pseudo_labelled_rows_apart() -> None:
    # Broken variant: confidence 1 of a label would swamp every pseudo-label it is mixed with.
    batch = _batch(20, 30)
    config = ProbPseudoMixupConfig()
    pairs, out = _pairs(batch, config), _mix(batch, config)
    assert int(pairs.partners[:20].max()) == 19
    assert int(pairs.partners[20:].min()) == 20
    confidences = batch.pseudo_confidences
    assert confidences is not None
    c, other = confidences.double(), confidences.double()[pairs.partners[20:] - 20]
    assert torch.allclose(pairs.lam[20:], c / (c + other))
    assert out.pseudo_confidences is not None
    assert torch.equal(out.pseudo_confidences, torch.maximum(c, other).float())
    levels = batch.images[:, 0, 0, 0].double()
    expected = pairs.lam * levels + (1 - pairs.lam) * levels[pairs.partners]
    assert torch.allclose(out.images[:, 0, 0, 0].double(), expected)


def test_prob_pseudo_mixup_by_boxes_recomputes_lambda_per_image() -> None:
    batch = _batch(0, 60)
    config = ProbPseudoMixupConfig(cutmix_share=1.0)
    out, pairs = _mix(batch, config), _pairs(batch, config)
    changed = (out.images != batch.images)[:, 0].float().mean((1, 2)).double()
    has_other = pairs.partners != torch.arange(60)
    assert torch.allclose(changed[has_other], 1 - pairs.lam[has_other])


def test_prob_pseudo_mixup_leaves_labelled_rows_alone_without_an_alpha() -> None:
    batch = _batch()
    out = _mix(batch, ProbPseudoMixupConfig(labeled_alpha=None))
    assert torch.equal(out.images[:4], batch.images[:4])


def test_prob_pseudo_mixup_without_confidences_is_refused() -> None:
    with pytest.raises(ValueError, match="fill pseudo_confidences"):
        _mix(_batch(pseudo_confidences=None), ProbPseudoMixupConfig())


# Manifold mixup.


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(192, 5)
        self.twice = nn.ReLU()
        self.unused = nn.Linear(5, 5)
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.twice(self.twice(self.first(x.flatten(1)))))


@pytest.fixture
def model() -> Classifier:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return Classifier(_Net(), Normalization(mean=(0, 0, 0), std=(1, 1, 1)))


def test_manifold_mixup_mixes_the_states_of_the_named_layer_as_the_targets(
    model: Classifier,
) -> None:
    batch = _batch()
    config = ManifoldMixupConfig(layers=("first",))
    pairs = _pairs(batch, config)
    with mixed(model, batch, config, seed=3, label_smoothing=0.0) as out:
        found = model(out.images)
    assert torch.equal(out.images, batch.images)
    assert isinstance(model.backbone, _Net)
    states = model.backbone.first(batch.images.flatten(1))
    expected = model.backbone.last(mix_rows(states, pairs.partners, pairs.lam).relu())
    assert torch.allclose(found, expected, atol=1e-6)
    one_hot = torch.eye(3)[batch.labels]
    assert batch.pseudo_targets is not None
    targets = mix_rows(torch.cat((one_hot, batch.pseudo_targets)), pairs.partners, pairs.lam)
    assert torch.allclose(_all_targets(out), targets)


def test_manifold_mixup_leaves_no_hook_behind(model: Classifier) -> None:
    images = _batch().images
    before = model(images)
    config = ManifoldMixupConfig(layers=("first",))
    with mixing_forward(model, config, seed=0, num_rows=10):
        inside = model(images)
    assert not torch.equal(inside, before)
    assert torch.equal(model(images), before)
    with (
        pytest.raises(RuntimeError, match="stop"),
        mixing_forward(model, config, seed=0, num_rows=10),
    ):
        raise RuntimeError("stop")
    assert torch.equal(model(images), before)


def test_manifold_mixup_of_the_input_is_mixup(model: Classifier) -> None:
    batch = _batch()
    config = ManifoldMixupConfig(layers=("input",))
    pairs = _pairs(batch, config)
    with mixed(model, batch, config, seed=3, label_smoothing=0.0) as out:
        assert torch.allclose(out.images, mix_rows(batch.images, pairs.partners, pairs.lam))
        assert torch.equal(model(out.images), model(out.images))  # no state is mixed


def test_manifold_mixup_draws_every_layer_equally_often() -> None:
    config = ManifoldMixupConfig(layers=("input", "first", "last"))
    layers = torch.tensor([_pairs(_batch(), config, seed=seed).layer for seed in range(600)])
    # 200; sigma = sqrt(600 * 1/3 * 2/3) = 11.5; 5 sigma = 58
    assert float((torch.bincount(layers, minlength=3) - 200).abs().max()) < 58


@pytest.mark.parametrize(
    ("layer", "num_rows", "message"),
    [
        ("second", 10, "no module second; it has input, first, twice, unused, last"),
        ("twice", 10, "twice ran 2 times"),
        ("unused", 10, "unused ran 0 times"),
        ("first", 7, r"first returns \(10, 5\).* each of the 7 samples"),
    ],
)
def test_layers_that_cannot_be_mixed_are_refused(
    model: Classifier, layer: str, num_rows: int, message: str
) -> None:
    config = ManifoldMixupConfig(layers=(layer,))
    with (
        pytest.raises(ValueError, match=message),
        mixing_forward(model, config, seed=0, num_rows=num_rows),
    ):
        model(_batch().images)


# Views, and the whole of it.


def test_the_images_of_an_unlabelled_view_are_mixed_with_each_other() -> None:
    view = _batch(0, 10).images
    batch = _batch(4, 0, pseudo_targets=None, pseudo_confidences=None)
    batch = Batch(batch.images, batch.labels, views={"unlabeled_strong": view})
    out = _mix(batch, MixupConfig())
    found = out.views["unlabeled_strong"]
    assert found.shape == view.shape
    assert not torch.equal(found, view)
    # each image is somewhere a partner once: the mean stays
    assert torch.allclose(found.mean(), view.mean())
    alone = Batch(view[:0], torch.zeros(0, dtype=torch.int64), views={"unlabeled_strong": view})
    assert torch.equal(_mix(alone, MixupConfig()).views["unlabeled_strong"], found)


@pytest.mark.parametrize("names", [("unlabeled_weak", "unlabeled_strong"), ("labeled_2",)])
def test_several_views_of_an_image_cannot_be_mixed(names: tuple[str, ...]) -> None:
    batch = _batch(views={name: torch.zeros(10, 3, 8, 8) for name in names})
    with pytest.raises(ValueError, match="compares several views"):
        _mix(batch, MixupConfig())


@pytest.mark.parametrize("config", _CONFIGS)
def test_labels_alone_are_mixed_too(config: Any) -> None:
    batch = _batch(8, 0, pseudo_targets=None, pseudo_confidences=None)
    out = _mix(batch, config)
    assert out.pseudo_targets is None
    assert out.label_targets is not None
    assert float(out.label_targets.amax(1).min()) < 1
    assert torch.allclose(out.label_targets.sum(1), torch.ones(8))
    assert torch.equal(out.labels, batch.labels)


def test_an_objective_that_takes_labels_from_views_refuses_mixing() -> None:
    with pytest.raises(ValidationError, match="kind=mixup does not go with"):
        TrainingConfig(
            architecture=SmallCnnConfig(),
            image_size=8,
            batch_size=4,
            duration=Duration(steps=1),
            objective=FixMatchConfig(),
            noise=NoiseConfig(mixing=MixupConfig()),
        )


def test_training_mixes_every_part_by_draws_of_its_own() -> None:
    # Broken variants: mixing that the trainer does not call, and one seed for all parts or steps.
    def weights(mixing: Any, accumulation_steps: int) -> list[Tensor]:
        config = TrainingConfig(
            architecture=SmallCnnConfig(width=4),
            image_size=8,
            batch_size=4,
            unlabeled_ratio=1,
            accumulation_steps=accumulation_steps,
            duration=Duration(steps=2),
            noise=NoiseConfig(mixing=mixing),
        )
        state = initial_state(config, 3, seed=0, device="cpu")
        parts = (_batch(4 // accumulation_steps, 4 // accumulation_steps),) * 8
        reports = train(
            state,
            config,
            lambda step, part, num_parts: parts[part],
            total_steps=2,
            num_labeled=4,
            layer_seed=0,
        )
        assert [report.step for report in reports] == [1, 2]
        return [p.detach() for p in state.model.parameters()]

    def equal(a: list[Tensor], b: list[Tensor]) -> bool:
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    plain = weights(None, 1)
    for mixing in (MixupConfig(), ManifoldMixupConfig(layers=("features.0",))):
        assert not equal(weights(mixing, 1), plain)
        assert equal(weights(mixing, 1), weights(mixing, 1))
    seeds: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        original = draw_pairs

        def noting(config: Any, *, seed: int, **rest: Any) -> Any:
            seeds.append(seed)
            return original(config, seed=seed, **rest)

        patch.setattr("models.mixing.draw_pairs", noting)
        weights(MixupConfig(), 2)
    assert len(set(seeds)) == 4  # two steps of two parts


def test_without_mixing_the_batch_is_left_as_it_is(model: Classifier) -> None:
    batch = _batch()
    with mixed(model, batch, None, seed=0, label_smoothing=0.1) as out:
        assert out is batch


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "mixup", "alpha": 0}, "greater than 0"),
        ({"kind": "cutmix", "prob": 0}, "greater than 0"),
        ({"kind": "manifold_mixup"}, "layers"),
        ({"kind": "manifold_mixup", "layers": ["input", "input"]}, "names a layer twice"),
        ({"kind": "blend"}, "'mixup', 'cutmix'"),
    ],
)
def test_impossible_mixing_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(MixingConfig).validate_python(fields)


@pytest.mark.gpu
@pytest.mark.parametrize("config", _CONFIGS)
def test_mixing_on_the_accelerator_is_that_of_the_cpu(config: Any) -> None:
    batch = _batch(pseudo_weights=torch.tensor([0.0, 0.5, 1.0, 2.0, 0.25, 0.0]))
    on_cpu = _mix(batch, config)
    fields = {name: getattr(batch, name) for name in ("images", "labels", "pseudo_targets")}
    fields |= {name: getattr(batch, name) for name in ("pseudo_weights", "pseudo_confidences")}
    on_device = _mix(Batch(**{name: value.cuda() for name, value in fields.items()}), config)
    assert torch.allclose(on_device.images.cpu(), on_cpu.images)
    assert torch.allclose(_all_targets(on_device).cpu(), _all_targets(on_cpu))
