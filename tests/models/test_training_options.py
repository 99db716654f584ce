"""The trainer's options: fp16 with its loss scale, layout, compilation, and means of weights."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

import models.compiling
from models.architectures import SmallCnnConfig
from models.compiling import CompileFallback
from models.durations import Duration
from models.noise import NoiseConfig
from models.noise.manifold_mixup import ManifoldMixupConfig
from models.objectives import Batch
from models.optimization import EmaConfig, OneCycleConfig, SGDConfig, SwaConfig
from models.scaling import load_scaler, scaler_tensors
from models.training import (
    NonFiniteTraining,
    StepReport,
    TrainingConfig,
    TrainingState,
    finish,
    initial_state,
    train,
)

NUM_CLASSES = 3
TOTAL_STEPS = 9


def config(**changes: Any) -> TrainingConfig:
    settings: dict[str, Any] = {
        "architecture": SmallCnnConfig(width=4),
        "image_size": 8,
        "batch_size": 8,
        "unlabeled_ratio": 0,
        "duration": Duration(steps=TOTAL_STEPS),
        "optimizer": SGDConfig(lr=0.05),
        "noise": NoiseConfig(dropout=0.3),
        "ema": None,
    }
    return TrainingConfig(**(settings | changes))


def next_batch(step: int, part: int = 0, num_parts: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(1000 + step)
    labels = torch.randint(NUM_CLASSES, (8,), generator=generator)
    images = torch.rand((8, 3, 8, 8), generator=generator) * 0.5
    images[torch.arange(8), labels] += 0.5
    own = slice(part * 8 // num_parts, (part + 1) * 8 // num_parts)
    return Batch(images[own], labels[own])


def steps(state: TrainingState, cfg: TrainingConfig, **options: Any) -> Iterator[StepReport]:
    return train(
        state, cfg, next_batch, total_steps=TOTAL_STEPS, num_labeled=40, layer_seed=7, **options
    )


def run(state: TrainingState, cfg: TrainingConfig, until: int = TOTAL_STEPS) -> list[StepReport]:
    reports: list[StepReport] = []
    for report in steps(state, cfg):
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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------------- fp16

FP16 = config(precision="fp16")


def scaled(
    scale: float = 2.0**10, growth_interval: int = 4, seed: int = 5, **changes: Any
) -> TrainingState:
    """A state with a loss scale, which torch has on the CPU too, where fp16 is only slow."""
    state = fresh(config(**changes), seed)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth_interval)
    return state


def test_fp16_is_refused_without_cuda():
    with pytest.raises(ValueError, match=r"precision=fp16 on device cpu: .* set precision to bf16"):
        fresh(FP16)


def test_fp16_trains_as_fp32_does_to_its_precision():
    # Broken variant: stepping by the gradient of the scaled loss, 1,024 times as far.
    state, plain = scaled(), fresh(config())
    name = "backbone.fc.weight"
    before = state.model.get_parameter(name).detach().clone()
    run(state, FP16, until=1)
    run(plain, config(), until=1)
    moved = state.model.get_parameter(name).detach() - before
    expected = plain.model.get_parameter(name).detach() - before
    assert moved.dtype == torch.float32
    assert not torch.equal(moved, expected)
    assert ((moved - expected).norm() / expected.norm()).item() < 0.02
    # As many more steps as it takes for small differences to grow: the losses stay near.
    last, last_plain = run(state, FP16)[-1], run(plain, config())[-1]
    assert last.loss == pytest.approx(last_plain.loss, abs=0.02)


def test_gradients_are_clipped_at_their_own_scale():
    # Broken variant: clipping the gradient of the scaled loss makes the step 1,024 times shorter.
    changes: dict[str, Any] = {
        "gradient_clip_norm": 0.01,
        "optimizer": SGDConfig(lr=1.0, momentum=0, nesterov=False, weight_decay=0),
    }
    state = scaled(**changes)
    before = [p.detach().clone() for p in state.model.parameters()]
    run(state, config(precision="fp16", **changes), until=1)
    moved = [p.detach() - b for p, b in zip(state.model.parameters(), before, strict=True)]
    length = torch.cat([m.flatten() for m in moved]).norm().item()
    assert length == pytest.approx(0.01, rel=1e-2)


def test_a_step_that_overflows_is_skipped_and_lowers_the_scale():
    # Broken variant: stepping anyway, after which the weights are not finite.
    state = scaled(scale=2.0**40)
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    reports = run(state, FP16, until=1)
    assert reports[0].step == 1
    assert equal(before, dict(state.model.named_parameters()))
    assert state.scaler is not None
    assert state.scaler.get_scale() == 2.0**39


def test_a_gradient_that_overflows_at_any_scale_stops_the_training():
    state = scaled(scale=2.0**-12)
    state.model.get_parameter("backbone.fc.weight").register_hook(lambda g: g * float("nan"))
    # 2^-12 halves at steps 0, 1 and 2, and is then below 2^-14.
    with pytest.raises(NonFiniteTraining, match=r"gradient, .* is not finite at step 2"):
        run(state, FP16)


@pytest.mark.parametrize("lost", [None, "scale", "growth_tracker"])
def test_resume_in_fp16_is_exact_only_with_the_whole_loss_scale(lost: str | None):
    # The scale doubles after 4 good steps, from 2^14 at step 4 on: within reach of an overflow.
    straight = scaled(2.0**14)
    run(straight, FP16)
    stopped = scaled(2.0**14)
    run(stopped, FP16, until=5)
    resumed = scaled(2.0**3, seed=77)
    resumed.restore(stopped.tensors(), stopped.scalars())
    assert resumed.scaler is not None
    assert equal(scaler_tensors(resumed.scaler), {
        "scale": torch.tensor(2.0**15, dtype=torch.float64), "growth_tracker": torch.tensor(1)
    })  # fmt: skip
    if lost is not None:
        kept = scaler_tensors(resumed.scaler)
        load_scaler(resumed.scaler, kept | {lost: torch.zeros_like(kept[lost]) + 2})
    run(resumed, FP16)
    assert equal(resumed.tensors(), straight.tensors()) == (lost is None)


def test_a_checkpoint_with_a_loss_scale_does_not_fit_a_config_without():
    state = scaled()
    with pytest.raises(ValueError, match="with a loss scale where the config has none"):
        fresh(config()).restore(state.tensors(), state.scalars())
    plain = fresh(config())
    with pytest.raises(ValueError, match="without a loss scale where the config has one"):
        state.restore(plain.tensors(), plain.scalars())


# ---------------------------------------------------------------------------- memory_format


def test_channels_last_lays_out_convolutions_and_resumes_exactly():
    cfg = config(memory_format="channels_last", ema=EmaConfig(decay=0.9))
    straight, stopped, plain = fresh(cfg), fresh(cfg), fresh(config())

    def layout(state: TrainingState) -> tuple[bool, bool]:
        weight = next(p for p in state.model.parameters() if p.ndim == 4 and p.shape[2] > 1)
        return (
            weight.is_contiguous(memory_format=torch.channels_last),
            weight.is_contiguous(),
        )

    assert layout(straight) == (True, False)
    assert layout(plain) == layout(fresh(config(memory_format="contiguous"))) == (False, True)
    run(straight, cfg)
    run(plain, config())
    run(stopped, cfg, until=4)
    resumed = fresh(cfg, seed=77)
    resumed.restore(stopped.tensors(), stopped.scalars())
    assert layout(resumed) == (True, False)
    run(resumed, cfg)
    assert equal(resumed.tensors(), straight.tensors())
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(straight.model.state_dict()[name], value, atol=1e-4, rtol=1e-3)


# ---------------------------------------------------------------------------- compile


def _compile_with(
    monkeypatch: pytest.MonkeyPatch, backend: Callable[[Any, Any], Callable[..., Any]]
) -> None:
    monkeypatch.setattr(
        models.compiling,
        "compile_network",
        lambda model: model.compile(backend=backend, dynamic=False),
    )
    torch._dynamo.reset()


def test_a_compiled_network_is_used_and_trains_the_same(monkeypatch: pytest.MonkeyPatch):
    num_compiled: list[int] = []

    def backend(graph: nn.Module, inputs: list[Tensor]) -> Callable[..., Any]:
        num_compiled.append(len(inputs))
        return graph.forward

    _compile_with(monkeypatch, backend)
    compiled, plain = fresh(config()), fresh(config())
    with warnings.catch_warnings():
        warnings.simplefilter("error", CompileFallback)
        run(compiled, config(compile=True))
    run(plain, config())
    assert num_compiled
    assert compiled.fallbacks == []
    assert compiled.tensors().keys() == plain.tensors().keys()
    assert equal(compiled.tensors(), plain.tensors())


class _BreaksBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:  # type: ignore[override]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError("InvalidCxxCompiler: no C++ compiler found\nand more lines")


def _fails_at_once(graph: nn.Module, inputs: list[Tensor]) -> Callable[..., Any]:
    raise RuntimeError("InvalidCxxCompiler: no C++ compiler found\nand more lines")


def _fails_in_backward(graph: nn.Module, inputs: list[Tensor]) -> Callable[..., Any]:
    # At the first weight, where the backward pass ends: the others have their gradients by then.
    first = next(i for i, value in enumerate(inputs) if value.requires_grad)

    def forward(*args: Tensor) -> Any:
        broken = [
            _BreaksBackward.apply(value) if i == first else value for i, value in enumerate(args)
        ]
        return graph.forward(*broken)

    return forward


@pytest.mark.parametrize("backend", [_fails_at_once, _fails_in_backward])
def test_failed_compilation_is_told_and_leaves_no_trace(
    backend: Callable[[Any, Any], Callable[..., Any]], monkeypatch: pytest.MonkeyPatch
):
    # Broken variants: BatchNorm's averages keep the movement of the forward pass that failed, or
    # the gradients what the backward pass had come to.
    _compile_with(monkeypatch, backend)
    state, plain = fresh(config()), fresh(config())
    with pytest.warns(CompileFallback, match="no C\\+\\+ compiler found"):
        run(state, config(compile=True))
    run(plain, config())
    assert equal(state.tensors(), plain.tensors())
    assert len(state.fallbacks) == 1
    assert "goes on without it" in state.fallbacks[0]
    assert "no C++ compiler found" in state.fallbacks[0]


def test_an_error_that_compilation_has_no_part_in_is_raised(monkeypatch: pytest.MonkeyPatch):
    _compile_with(monkeypatch, lambda graph, inputs: graph.forward)

    def broken(step: int, part: int, num_parts: int) -> Batch:
        raise LookupError("shard is gone")

    state = fresh(config())
    with pytest.raises(LookupError, match="shard is gone"):
        next(train(state, config(compile=True), broken, total_steps=3, num_labeled=9, layer_seed=1))
    assert state.fallbacks == []


@pytest.mark.slow
def test_inductor_compiles_and_trains_nearly_the_same():
    torch._dynamo.reset()
    cfg, plain_cfg = config(compile=True, noise=NoiseConfig()), config(noise=NoiseConfig())
    compiled, plain = fresh(cfg), fresh(plain_cfg)
    reports, expected = run(compiled, cfg), run(plain, plain_cfg)
    if compiled.fallbacks:
        pytest.skip(compiled.fallbacks[0])
    assert reports[-1].loss == pytest.approx(expected[-1].loss, rel=1e-3)


def test_what_a_compiled_network_cannot_do_is_refused():
    mixing = ManifoldMixupConfig(layers=("input",))
    with pytest.raises(
        ValidationError, match=r"compile=true with noise.mixing.kind=manifold_mixup"
    ):
        config(compile=True, noise=NoiseConfig(mixing=mixing))


# ---------------------------------------------------------------------------- swa

# From floor(0.5 * 9) = 4 on, every second update: 6 and 8.
SWA = config(swa=SwaConfig(start_fraction=0.5, every_steps=2))


def test_swa_is_the_mean_of_the_weights_of_its_steps():
    state = fresh(SWA)
    seen = {
        report.step: state.model.get_parameter("backbone.fc.weight").detach().clone()
        for report in steps(state, SWA)
    }
    assert state.swa is not None
    torch.testing.assert_close(
        state.swa.get_parameter("backbone.fc.weight").data, (seen[6] + seen[8]) / 2
    )
    assert state.final_model is state.swa
    assert not state.swa.training


@pytest.mark.parametrize("stop_at", [3, 7])
@pytest.mark.parametrize("is_lost", [False, True])
def test_resume_with_swa_is_exact_only_with_its_mean(stop_at: int, is_lost: bool):
    straight, stopped, resumed = fresh(SWA), fresh(SWA), fresh(SWA, seed=77)
    run(straight, SWA)
    run(stopped, SWA, until=stop_at)
    resumed.restore(stopped.tensors(), stopped.scalars())
    if is_lost:
        resumed.swa = fresh(SWA, seed=77).swa
    run(resumed, SWA)
    # At step 3 the mean has not begun: there is nothing to lose.
    assert equal(resumed.tensors(), straight.tensors()) == (not is_lost or stop_at == 3)


def test_finished_swa_has_batchnorm_statistics_of_its_own():
    # Broken variant: the statistics of the last weights, which the mean of weights does not have.
    state = fresh(SWA)
    run(state, SWA)
    assert state.swa is not None
    name = next(n for n, _ in state.swa.named_buffers() if n.endswith("running_mean"))
    left_by_training = state.swa.get_buffer(name).clone()
    asked: list[int] = []

    def noted(step: int, part: int, num_parts: int) -> Batch:
        asked.append(step)
        return next_batch(step, part, num_parts)

    finish(state, SWA, noted, total_steps=TOTAL_STEPS)
    assert asked == list(range(TOTAL_STEPS))  # the last 100 of them
    found = state.swa.get_buffer(name).clone()
    assert not torch.equal(found, left_by_training)
    finish(state, SWA, next_batch, total_steps=TOTAL_STEPS)
    assert torch.equal(state.swa.get_buffer(name), found)  # a second time changes nothing


def test_without_swa_finishing_does_nothing():
    state = fresh(config())
    run(state, config())
    before = state.tensors()
    finish(state, config(), lambda *_: pytest.fail("no batch is needed"), total_steps=TOTAL_STEPS)
    assert equal(state.tensors(), before)


def test_final_weights_are_those_of_the_config():
    both: dict[str, Any] = {"swa": SWA.swa, "ema": EmaConfig(decay=0.5)}
    state = fresh(config(**both))
    assert state.final_model is state.swa
    last = fresh(config(ema=EmaConfig(), final_weights="last"))
    assert last.final_model is last.model
    with pytest.raises(ValidationError, match="final_weights=ema needs ema"):
        config(final_weights="ema")
    with pytest.raises(ValidationError, match="swa has no effect with final_weights=ema"):
        config(**both, final_weights="ema")


def test_swa_that_would_average_nothing_is_refused():
    cfg = config(swa=SwaConfig(start_fraction=0.5, every_steps=6))
    with pytest.raises(ValueError, match=r"every_steps=6 after .* of 9 steps averages no weights"):
        run(fresh(cfg), cfg)


# ---------------------------------------------------------------------------- schedules


def test_warmup_beside_one_cycle_is_refused():
    with pytest.raises(ValidationError, match="one_cycle, which rises by itself"):
        config(schedule=OneCycleConfig(), warmup=Duration(steps=2))
