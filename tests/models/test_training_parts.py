"""A step in parts: micro-batches of one process or of several give what is promised of them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn

from models.architectures import SmallCnnConfig
from models.architectures.classifier import Classifier, Normalization
from models.durations import Duration
from models.gradients import GradientPass, Step
from models.noise import NoiseConfig
from models.noise.mixup import MixupConfig
from models.objectives import Batch, JointConfig, Models, StepLoss, build_objective
from models.optimization import SGDConfig
from models.randomness import derive_seed
from models.ranks import ONE_PROCESS, Ranks, parts_of_step, refuse_unsynchronised_batchnorm
from models.training import TrainingConfig, TrainingState, initial_state, train

_SCRIPT = Path(__file__).with_name("train_on_ranks.py")
_ROOT = Path(__file__).parents[2]


def config(**changes: Any) -> TrainingConfig:
    settings: dict[str, Any] = {
        "architecture": SmallCnnConfig(width=4),
        "image_size": 8,
        "batch_size": 12,
        "unlabeled_ratio": 0,
        "duration": Duration(steps=3),
        "optimizer": SGDConfig(lr=0.1),
        "ema": None,
        "objective": JointConfig(label_smoothing=0),
    }
    return TrainingConfig(**(settings | changes))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def part_of(step: int, part: int, num_parts: int) -> Batch:
    """Labelled and pseudo-labelled images 1 : 1, a part being an equal slice of each stream."""
    generator = torch.Generator().manual_seed(step)
    images = torch.rand((2, 12, 3, 8, 8), generator=generator)
    labels = torch.randint(3, (12,), generator=generator)
    soft = torch.rand((12, 3), generator=generator).softmax(1)
    own = slice(part * 12 // num_parts, (part + 1) * 12 // num_parts)
    return Batch(torch.cat([images[0, own], images[1, own]]), labels[own], soft[own])


def linear_model() -> Classifier:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return Classifier(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), Normalization())


def gradients_of(model: Classifier, cfg: TrainingConfig) -> tuple[StepLoss, list[Tensor]]:
    step = GradientPass(
        cfg,
        build_objective(cfg.objective),
        Models(model),
        ranks=ONE_PROCESS,
        layer_stream=7,
        device=torch.device("cpu"),
    )
    found = step(Step(number=2, total_steps=9, objective_state={}), part_of)
    return found, [p.grad.clone() for p in model.parameters() if p.grad is not None]


# ---------------------------------------------------------------------------- accumulation


@pytest.mark.parametrize("parts", [2, 3, 12])
@pytest.mark.parametrize("normalization", ["labeled_batch", "concat_mean"])
def test_micro_batches_without_batchnorm_give_the_gradient_of_the_joint_batch(
    parts: int, normalization: str
):
    # Broken variants: a sum over the parts, or the last part alone.
    objective = JointConfig(loss_normalization=normalization)  # type: ignore[arg-type]
    joint = config(unlabeled_ratio=1, objective=objective)
    split = config(unlabeled_ratio=1, objective=objective, accumulation_steps=parts)
    whole, expected = gradients_of(linear_model(), joint)
    found, gradients = gradients_of(linear_model(), split)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.loss, whole.loss)
    torch.testing.assert_close(found.logs, whole.logs)
    assert max(g.abs().max().item() for g in expected) > 0.01


def test_running_averages_move_once_a_step_by_the_mean_over_its_parts():
    # Two parts of mean 1 and 3, momentum 0.1: 0.9 * 0 + 0.1 * (1 + 3) / 2 = 0.2. One after the
    # other (the broken variant, which depends on how many parts a rank does) gives 0.39.
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 3))
    model = Classifier(network, Normalization(mean=(0, 0, 0), std=(1, 1, 1)))
    norm = model.backbone[0]  # type: ignore[index]
    assert isinstance(norm, nn.BatchNorm2d)

    def constant(step: int, part: int, num_parts: int) -> Batch:
        return Batch(torch.full((6, 3, 2, 2), 1.0 + 2 * part), torch.zeros(6, dtype=torch.int64))

    cfg = config(accumulation_steps=2)
    state = initial_state(cfg, 3, seed=0, device="cpu")
    state.model = model
    next(train(state, cfg, constant, total_steps=3, num_labeled=12, layer_seed=1))
    torch.testing.assert_close(norm.running_mean, torch.full((3,), 0.2))
    torch.testing.assert_close(norm.running_var, torch.full((3,), 0.9))  # constant: variance 0
    assert norm.num_batches_tracked is not None
    assert norm.num_batches_tracked.item() == 1


def test_frozen_batchnorm_keeps_its_averages_bit_by_bit():
    network = nn.Sequential(nn.BatchNorm2d(3).eval(), nn.Flatten(), nn.Linear(192, 3))
    model = Classifier(network, Normalization())
    norm = model.backbone[0]  # type: ignore[index]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    norm.running_mean.copy_(torch.tensor([0.1, 0.2, 0.3]))
    gradients_of(model, config(accumulation_steps=3))
    assert norm.running_mean.tolist() == torch.tensor([0.1, 0.2, 0.3]).tolist()


def test_layer_noise_of_a_part_is_seeded_by_step_and_part():
    seeds: list[tuple[int, float]] = []

    class Witness(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(192, 3)

        def forward(self, images: Tensor) -> Tensor:
            seeds.append((torch.initial_seed(), torch.rand(()).item()))
            return self.linear(images.flatten(1))

    model = Classifier(Witness(), Normalization())
    gradients_of(model, config())
    gradients_of(model, config(accumulation_steps=3))
    expected = [derive_seed(7, 2), *(derive_seed(7, 2, part) for part in range(3))]
    assert [seed for seed, _ in seeds] == expected
    assert len({draw for _, draw in seeds}) == 4


def test_only_the_parts_of_the_rank_are_asked_for():
    asked: list[tuple[int, int, int]] = []

    def note(step: int, part: int, num_parts: int) -> Batch:
        asked.append((step, part, num_parts))
        raise StopIteration  # before anything is sent to the other ranks

    cfg = config(accumulation_steps=6)
    state = initial_state(cfg, 3, seed=0, device="cpu")
    ranks = Ranks(rank=1, world_size=3)
    steps = train(state, cfg, note, total_steps=3, num_labeled=12, layer_seed=1, ranks=ranks)
    with pytest.raises(RuntimeError, match="StopIteration"):
        next(steps)
    assert asked == [(0, 2, 6)]
    assert parts_of_step(cfg, 3) == (6, 2)


@pytest.mark.parametrize("lost", [None, "objective", "step"])
def test_resume_with_micro_batches_mixup_and_an_objective_with_a_state_is_exact(lost: str | None):
    cfg = config(
        unlabeled_ratio=1,
        accumulation_steps=3,
        duration=Duration(steps=6),
        objective=JointConfig(loss_normalization="moving_average"),
        noise=NoiseConfig(dropout=0.3, mixing=MixupConfig()),
    )

    def run(state: TrainingState, until: int = 6) -> dict[str, Tensor]:
        reports = train(state, cfg, part_of, total_steps=6, num_labeled=12, layer_seed=1)
        next(report for report in reports if report.step == until)
        return state.tensors()

    straight = run(initial_state(cfg, 3, seed=0, device="cpu"))
    stopped, resumed = (initial_state(cfg, 3, seed=seed, device="cpu") for seed in (0, 9))
    fresh_objective = dict(resumed.objective_state)
    resumed.restore(run(stopped, until=4), stopped.scalars())
    if lost == "objective":
        resumed.objective_state = fresh_objective
    elif lost == "step":
        resumed.step = 3
    found = run(resumed)
    assert found.keys() == straight.keys()
    is_equal = all(torch.equal(found[name], straight[name]) for name in found)
    assert is_equal == (lost is None)


def test_parts_are_mixed_before_the_objective_sees_them():
    plain, mixed = (
        config(accumulation_steps=3),
        config(accumulation_steps=3, noise=NoiseConfig(mixing=MixupConfig())),
    )
    _, expected = gradients_of(linear_model(), plain)
    _, found = gradients_of(linear_model(), mixed)
    _, again = gradients_of(linear_model(), mixed)
    assert not torch.equal(found[0], expected[0])
    assert torch.equal(found[0], again[0])


# ---------------------------------------------------------------------------- ranks


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Tensor]]]:
    """What one process and each of two processes made of the same trainings."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"}
    outs = {(rank, size): folder / f"{rank}-{size}" for rank, size in [(0, 1), (0, 2), (1, 2)]}
    processes = [
        subprocess.Popen(
            [sys.executable, str(_SCRIPT), str(rank), str(size), str(folder / "meet"), str(out)],
            env=environment,
            stderr=subprocess.PIPE,
        )
        for (rank, size), out in outs.items()
    ]
    for process in processes:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors.decode()
    return {
        1: [load_file(outs[0, 1])],
        2: [load_file(outs[0, 2]), load_file(outs[1, 2])],
    }


@pytest.mark.parametrize("training", ["batchnorm", "joint"])
def test_two_processes_train_what_one_process_trains(
    on_ranks: dict[int, list[dict[str, Tensor]]], training: str
):
    # batchnorm: 4 micro-batches, dropout and stochastic depth on; joint: one batch, no BatchNorm.
    # Broken variants: BatchNorm's averages, the objective's state or the losses of one rank alone.
    names = [
        name
        for name in on_ranks[1][0]
        if name.startswith(f"{training}/") and not name.endswith("/reductions")
    ]
    kinds = {name.split("/")[1].split(".")[0] for name in names}
    assert kinds >= {"model", "optimizer", "objective", "losses"}
    for name in names:
        for found in on_ranks[2]:
            torch.testing.assert_close(
                found[name], on_ranks[1][0][name], rtol=0, atol=1e-9, msg=lambda m, n=name: n + m
            )
    share = on_ranks[1][0][f"{training}/objective.share"]
    assert (share - 1 / 3).abs().max().item() > 0.01  # the state has moved


def test_ranks_stay_equal_bit_by_bit(on_ranks: dict[int, list[dict[str, Tensor]]]):
    first, second = on_ranks[2]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gradients_are_reduced_once_a_step(on_ranks: dict[int, list[dict[str, Tensor]]]):
    # 5 steps of 2 parts a rank, one bucket: the variant without no_sync reduces 10 times.
    assert on_ranks[2][0]["batchnorm/reductions"].item() == 5


# ---------------------------------------------------------------------------- what is refused


def test_images_that_do_not_divide_are_refused_with_the_nearest_batch_sizes():
    with pytest.raises(
        ValidationError, match=r"12 labeled images .* 5 equal parts .*batch_size to 10 or 15"
    ):
        config(accumulation_steps=5)
    with pytest.raises(ValidationError, match="take 4 or 6 parts"):
        config(accumulation_steps=5)


def test_ranks_that_do_not_divide_are_refused_with_the_nearest_numbers():
    with pytest.raises(ValueError, match=r"3 ranks: start 2 or 4 ranks, or set .* to 3 or 6"):
        parts_of_step(config(accumulation_steps=4), 3)
    with pytest.raises(ValueError, match=r"5 equal parts \(5 ranks\): set batch_size to 10 or 15"):
        parts_of_step(config(), 5)
    assert parts_of_step(config(), 4) == (4, 1)
    assert parts_of_step(config(accumulation_steps=4), 2) == (4, 2)
    assert parts_of_step(config(), 1) == (1, 1)


def test_micro_batches_of_one_image_are_refused():
    with pytest.raises(ValidationError, match="at least 2 images a step and micro-batch"):
        config(accumulation_steps=12)


def test_batchnorm_over_several_ranks_needs_micro_batches_or_synchronisation():
    cfg = config()
    state = initial_state(cfg, 3, seed=0, device="cpu")
    model = state.model
    with pytest.raises(ValueError, match="set accumulation_steps to 2"):
        refuse_unsynchronised_batchnorm(model, accumulation_steps=1, world_size=2)
    ranks = Ranks(rank=0, world_size=2)
    with pytest.raises(ValueError, match="set accumulation_steps to 2"):
        next(train(state, cfg, part_of, total_steps=3, num_labeled=12, layer_seed=1, ranks=ranks))
    for accepted in (
        (model, 2, 2),
        (model, 1, 1),
        (nn.SyncBatchNorm.convert_sync_batchnorm(model), 1, 2),
        (nn.Linear(1, 1), 1, 2),
        (nn.BatchNorm2d(3).eval(), 1, 2),
    ):
        module, accumulation, world_size = accepted
        refuse_unsynchronised_batchnorm(
            module, accumulation_steps=accumulation, world_size=world_size
        )


def test_a_rank_outside_the_world_is_refused():
    with pytest.raises(ValueError, match=r"rank=2 must be in \[0, world_size=2\)"):
        Ranks(rank=2, world_size=2)


def test_one_rank_gives_tensors_back_untouched():
    tensors = [torch.tensor([1.0]), torch.tensor(2)]
    assert all(a is b for a, b in zip(ONE_PROCESS.all_reduce_mean(tensors), tensors, strict=True))
