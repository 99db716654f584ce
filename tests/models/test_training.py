"""The trainer: exact resume, detection of non-finite numbers, reports, precision; and inference."""

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from models.architectures import SmallCnnConfig
from models.durations import Duration
from models.inference import InferenceNetwork, log_probabilities
from models.noise import NoiseConfig, StochasticDepthConfig
from models.objectives import Batch
from models.optimization import AdamWConfig, EmaConfig, LARSConfig, RMSpropTFConfig, SGDConfig
from models.training import (
    NonFiniteTraining,
    StepReport,
    TrainingConfig,
    TrainingState,
    initial_state,
    train,
)

NUM_CLASSES = 3
TOTAL_STEPS = 9
OPTIMIZERS = {
    "adamw": AdamWConfig(lr=3e-3),
    "sgd": SGDConfig(lr=0.02),
    "sgd_plain": SGDConfig(lr=0.05, momentum=0, nesterov=False),
    "rmsprop_tf": RMSpropTFConfig(lr=1e-2, lr_scaling="none"),
    "lars": LARSConfig(lr=0.05, lr_scaling="none", trust_coefficient=0.1),
}


def config(optimizer: str | SGDConfig = "adamw", **changes: Any) -> TrainingConfig:
    settings: dict[str, Any] = {
        "architecture": SmallCnnConfig(width=4),
        "image_size": 8,
        "batch_size": 4,
        "unlabeled_ratio": 1,
        "duration": Duration(steps=TOTAL_STEPS),
        "warmup": Duration(steps=2),
        "optimizer": OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer,
        "noise": NoiseConfig(
            dropout=0.3, stochastic_depth=StochasticDepthConfig(rate=0.5, rule="linear_huang")
        ),
        "ema": EmaConfig(decay=0.9),
        "gradient_clip_norm": 5.0,
    }
    return TrainingConfig(**(settings | changes))


def next_batch(step: int, part: int = 0, num_parts: int = 1) -> Batch:
    """A learnable batch of the step: class = brightest channel; soft pseudo-labels of the same."""
    generator = torch.Generator().manual_seed(1000 + step)
    labels = torch.randint(NUM_CLASSES, (8,), generator=generator)
    images = torch.rand((8, 3, 8, 8), generator=generator) * 0.5
    images[torch.arange(8), labels] += 0.5
    soft = torch.nn.functional.one_hot(labels[4:], NUM_CLASSES) * 0.7 + 0.1
    return Batch(images, labels[:4], soft)


def run(
    state: TrainingState, cfg: TrainingConfig, until: int = TOTAL_STEPS, **options: Any
) -> list[StepReport]:
    """Train until a step, as a stage of TOTAL_STEPS that is stopped there."""
    reports: list[StepReport] = []
    for report in train(
        state, cfg, next_batch, total_steps=TOTAL_STEPS, num_labeled=40, layer_seed=7, **options
    ):
        reports.append(report)
        if report.step == until:
            break
    return reports


def fresh(cfg: TrainingConfig, seed: int = 5) -> TrainingState:
    return initial_state(cfg, NUM_CLASSES, seed=seed, device="cpu")


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Such small networks lose more than they gain by threads, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("stop_at", [1, 4])
def test_interrupted_and_uninterrupted_training_give_identical_tensors(
    optimizer: str, stop_at: int
):
    cfg = config(optimizer)
    straight = fresh(cfg)
    straight_reports = run(straight, cfg)

    stopped = fresh(cfg)
    first_reports = run(stopped, cfg, until=stop_at)
    tensors, scalars = stopped.tensors(), stopped.scalars()
    torch.manual_seed(999)  # a new process has another global generator
    resumed = fresh(cfg, seed=77)  # and its fresh weights are not to shine through
    resumed.restore(tensors, scalars)
    assert resumed.step == stop_at
    assert equal(resumed.tensors(), tensors)
    resumed_reports = run(resumed, cfg)

    assert resumed.scalars() == straight.scalars()
    assert equal(resumed.tensors(), straight.tensors())
    assert first_reports + resumed_reports == straight_reports


@pytest.mark.parametrize("lost", ["ema", "optimizer", "step", "model"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "rmsprop_tf", "lars"])
def test_resume_that_loses_a_part_of_the_state_ends_elsewhere(optimizer: str, lost: str):
    cfg = config(optimizer)
    straight = fresh(cfg)
    run(straight, cfg)
    stopped = fresh(cfg)
    run(stopped, cfg, until=4)
    resumed = fresh(cfg, seed=77)
    untouched = fresh(cfg, seed=77)
    resumed.restore(stopped.tensors(), stopped.scalars())
    assert resumed.step == 4
    match lost:
        case "ema":
            resumed.ema = untouched.ema
        case "optimizer":
            resumed.optimizer.state.clear()
        case "step":
            resumed.step = 3
        case _:
            resumed.model.load_state_dict(untouched.model.state_dict())
    run(resumed, cfg)
    assert not equal(resumed.tensors(), straight.tensors())


def test_layer_noise_matters_and_comes_from_the_seed_alone():
    cfg = config()
    one, two, other, noiseless = (
        fresh(cfg),
        fresh(cfg),
        fresh(cfg),
        fresh(config(noise=NoiseConfig())),
    )
    run(one, cfg)
    torch.manual_seed(123)
    run(two, cfg)
    list(train(other, cfg, next_batch, total_steps=TOTAL_STEPS, num_labeled=40, layer_seed=8))
    run(noiseless, config(noise=NoiseConfig()))
    assert equal(one.tensors(), two.tensors())
    assert not equal(one.tensors(), other.tensors())
    assert not equal(one.tensors(), noiseless.tensors())


def test_training_leaves_the_global_generator_alone():
    cfg = config()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    run(fresh(cfg), cfg)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_the_caller_does_between_reports_changes_nothing():
    cfg = config()
    undisturbed, disturbed = fresh(cfg), fresh(cfg)
    run(undisturbed, cfg)
    for _ in train(
        disturbed, cfg, next_batch, total_steps=TOTAL_STEPS, num_labeled=40, layer_seed=7
    ):
        disturbed.model.eval()
        torch.rand(3)
        disturbed.tensors()
    assert equal(undisturbed.tensors(), disturbed.tensors())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t, s: t.pop("model.backbone.fc.weight"), "incomplete"),
        (lambda t, s: s.update(schema=2), "schema 2"),
        (lambda t, s: s.update(step=-1), "step -1"),
        (lambda t, s: t.update({"model.backbone.fc.weight": torch.zeros(1)}), "does not fit"),
        (
            lambda t, s: t.update({"optimizer.backbone.fc.weight.exp_avg": torch.zeros(2)}),
            "has shape",
        ),
        (lambda t, s: (t.pop("ema.backbone.fc.bias"), t.update(x=torch.zeros(1))), "does not fit"),
        (
            lambda t, s: (
                t.update({"optimizer.nobody.exp_avg": torch.zeros(1)}),
                s.update(num_tensors=s["num_tensors"] + 1),
            ),
            "unknown parameter 'nobody'",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(damage: Any, message: str):
    cfg = config()
    state = fresh(cfg)
    run(state, cfg, until=2)
    tensors, scalars = state.tensors(), state.scalars()
    damage(tensors, scalars)
    with pytest.raises(ValueError, match=message):
        fresh(cfg).restore(tensors, scalars)


def test_a_checkpoint_with_average_does_not_fit_a_config_without():
    state = fresh(config())
    with pytest.raises(ValueError, match="with a moving average where the config has none"):
        fresh(config(ema=None)).restore(state.tensors(), state.scalars())


def test_checkpoint_tensors_are_copies_and_named_by_part():
    cfg = config()
    state = fresh(cfg)
    run(state, cfg, until=1)
    tensors = state.tensors()
    kept = {name: value.clone() for name, value in tensors.items()}
    run(state, cfg)
    assert equal(tensors, kept)
    assert {name.split(".")[0] for name in tensors} == {"model", "ema", "optimizer"}
    assert tensors["optimizer.backbone.fc.weight.exp_avg"].shape == (NUM_CLASSES, 16)
    assert state.scalars()["step"] == TOTAL_STEPS


# ---------------------------------------------------------------------------------- reports


def test_reports_are_means_over_absolute_intervals():
    cfg = config()
    every = run(fresh(cfg), cfg)
    assert [r.step for r in every] == list(range(1, 10))
    sparse = run(fresh(cfg), cfg, report_every=4)
    assert [r.step for r in sparse] == [4, 8, 9]
    assert sparse[0].loss == pytest.approx(sum(r.loss for r in every[:4]) / 4)
    assert sparse[2].loss == pytest.approx(every[8].loss)
    accuracy = "labeled_accuracy"
    assert sparse[1].logs[accuracy] == pytest.approx(sum(r.logs[accuracy] for r in every[4:8]) / 4)
    assert set(every[0].logs) == {
        "labeled_loss",
        "labeled_accuracy",
        "pseudo_loss",
        "pseudo_accuracy",
    }


def test_learning_rates_of_the_reports_follow_warmup_and_cosine():
    # peak 0.003; warm-up 0, 1/2, then half a cosine over 7 steps
    rates = [r.learning_rate for r in run(fresh(config()), config())]
    expected = [0, 0.5] + [0.5 * (1 + math.cos(math.pi * i / 7)) for i in range(7)]
    assert rates == pytest.approx([0.003 * e for e in expected])


def test_finished_training_reports_nothing():
    cfg = config()
    state = fresh(cfg)
    run(state, cfg)
    assert run(state, cfg) == []


def test_forward_goes_through_the_given_wrapper():
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner
            self.num_calls = 0

        def forward(self, images: Tensor) -> Tensor:
            self.num_calls += 1
            return self.inner(images)

    cfg = config()
    plain, wrapped = fresh(cfg), fresh(cfg)
    wrapper = Wrapper(wrapped.model)
    run(plain, cfg)
    run(wrapped, cfg, forward_model=wrapper)
    assert wrapper.num_calls == TOTAL_STEPS
    assert equal(plain.tensors(), wrapped.tensors())


# ---------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "rmsprop_tf", "lars"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_optimizer_learns_in_both_precisions(optimizer: str, precision: str):
    cfg = config(
        optimizer,
        precision=precision,
        noise=NoiseConfig(),
        # A CPU without instructions for bf16 takes ten times as long for twice the width.
        architecture=SmallCnnConfig(width=8),
        duration=Duration(steps=80),
    )
    state = fresh(cfg)
    reports = list(
        train(state, cfg, next_batch, total_steps=80, num_labeled=40, layer_seed=7, report_every=20)
    )
    assert reports[-1].loss < 0.75 * reports[0].loss
    assert reports[-1].logs["labeled_accuracy"] > 0.85  # chance: 0.33
    assert {t.dtype for n, t in state.tensors().items() if n.endswith("weight")} == {torch.float32}


def test_bf16_differs_from_fp32_and_resumes_exactly():
    cfg = config(precision="bf16")
    straight, stopped, single = fresh(cfg), fresh(cfg), fresh(config())
    run(straight, cfg)
    run(single, config())
    run(stopped, cfg, until=3)
    resumed = fresh(cfg, seed=8)
    resumed.restore(stopped.tensors(), stopped.scalars())
    run(resumed, cfg)
    assert equal(resumed.tensors(), straight.tensors())
    assert not equal(single.tensors(), straight.tensors())


def test_average_is_what_is_used_and_the_model_where_there_is_none():
    state = fresh(config())
    assert state.ema is not None
    assert state.final_model is state.ema
    assert not state.ema.training
    assert not any(p.requires_grad for p in state.ema.parameters())
    without = fresh(config(ema=None))
    assert without.final_model is without.model
    run(without, config(ema=None))
    assert not any(name.startswith("ema.") for name in without.tensors())


def test_average_follows_the_released_ramp():
    # after the first update (n = 0, decay 0.1): ema = 0.1 * initial + 0.9 * weights
    cfg = config("sgd", warmup=None)
    state = fresh(cfg)
    initial = state.tensors()["model.backbone.fc.weight"]
    run(state, cfg, until=1)
    tensors = state.tensors()
    expected = 0.1 * initial + 0.9 * tensors["model.backbone.fc.weight"]
    torch.testing.assert_close(tensors["ema.backbone.fc.weight"], expected)
    assert not torch.equal(tensors["model.backbone.fc.weight"], initial)


def test_initial_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a = fresh(config())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert equal(a.tensors(), fresh(config()).tensors())
    assert not equal(a.tensors(), fresh(config(), seed=6).tensors())


# ---------------------------------------------------------------------------------- non-finite


def test_non_finite_loss_stops_with_the_step_it_happened_at():
    cfg = config()

    def poisoned(step: int, part: int, num_parts: int) -> Batch:
        batch = next_batch(step)
        return (
            Batch(batch.images * math.nan, batch.labels, batch.pseudo_targets)
            if step == 5
            else batch
        )

    reports: list[StepReport] = []
    steps = train(
        fresh(cfg),
        cfg,
        poisoned,
        total_steps=TOTAL_STEPS,
        num_labeled=40,
        layer_seed=7,
        report_every=4,
    )
    with pytest.raises(NonFiniteTraining, match="loss is not finite at step 5") as caught:
        reports.extend(steps)
    assert [r.step for r in reports] == [4]  # nothing is reported of the broken interval
    assert caught.value.step == 5
    assert caught.value.learning_rate == pytest.approx(
        0.003 * 0.5 * (1 + math.cos(math.pi * 3 / 7))
    )


def test_non_finite_weights_stop_before_they_can_be_saved():
    cfg = config(
        SGDConfig(lr=1e38, momentum=0, nesterov=False, weight_decay=0),
        ema=None,
        gradient_clip_norm=None,
        warmup=None,
    )
    with pytest.raises(NonFiniteTraining, match="not finite at step 0, learning rate 1e\\+38"):
        run(fresh(cfg), cfg)


# ---------------------------------------------------------------------------------- config


def test_batch_of_one_image_is_refused():
    with pytest.raises(ValidationError, match="BatchNorm needs at least 2"):
        config(batch_size=1, unlabeled_ratio=0)


def test_nesterov_without_momentum_is_refused():
    with pytest.raises(ValidationError, match="nesterov"):
        config(optimizer=SGDConfig(momentum=0, nesterov=True))


def test_checkpoint_intervals_are_marked_as_without_effect_on_the_result():
    marked = {
        name
        for name, field in TrainingConfig.model_fields.items()
        if isinstance(field.json_schema_extra, dict)
        and field.json_schema_extra.get("fingerprint") == "excluded"
    }
    assert marked == {"checkpoint_every_steps", "checkpoint_every_seconds", "checkpoints_kept"}


def test_config_survives_json_and_refuses_unknown_keys():
    cfg = config("rmsprop_tf")
    assert TrainingConfig.model_validate_json(cfg.model_dump_json()) == cfg
    with pytest.raises(ValidationError, match="clip"):
        config(clip=1.0)


# ---------------------------------------------------------------------------------- inference


def test_log_probabilities_and_logsumexp_give_back_the_logits():
    model = fresh(config()).final_model
    images = next_batch(0).images
    log_probs, log_sums = log_probabilities(InferenceNetwork(model), images)
    with torch.no_grad():
        logits = copy.deepcopy(model).eval()(images)
    torch.testing.assert_close(log_probs + log_sums[:, None], logits)
    torch.testing.assert_close(log_probs.exp().sum(dim=1), torch.ones(8))
    assert log_probs.dtype == log_sums.dtype == torch.float32


def test_inference_is_without_noise_and_leaves_the_mode():
    model = fresh(config()).model.train()
    images = next_batch(0).images
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first, _ = log_probabilities(InferenceNetwork(model), images)
    second, _ = log_probabilities(InferenceNetwork(model), images)
    assert torch.equal(first, second)
    assert model.training
    assert equal(before, model.state_dict())


def test_bytes_and_floats_of_the_same_image_predict_the_same():
    model = fresh(config()).model
    ready = InferenceNetwork(model)
    raw = torch.randint(
        256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(
        log_probabilities(ready, raw)[0], log_probabilities(ready, raw.float() / 255)[0]
    )


def test_bf16_inference_is_close_and_given_in_float32():
    model = fresh(config()).model
    images = next_batch(0).images
    exact, _ = log_probabilities(InferenceNetwork(model), images)
    rough, _ = log_probabilities(InferenceNetwork(model, "bf16"), images)
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    assert (rough - exact).abs().max().item() < 0.1


def test_broken_model_is_refused_with_the_row():
    model = fresh(config()).model
    images = next_batch(0).images
    images[2] = math.nan
    with pytest.raises(ValueError, match=r"logits of 1 of 8 images are not finite \(first: row 2"):
        log_probabilities(InferenceNetwork(model), images)
