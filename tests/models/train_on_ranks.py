"""One rank of a tiny training in float64: `train_on_ranks.py RANK WORLD_SIZE RENDEZVOUS OUT`.

Run by test_training_parts.py. What is trained is written to OUT as safetensors.
"""

import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import models.training
import models.training_state
from models.architectures import SmallCnnConfig
from models.architectures.classifier import Classifier, Normalization
from models.durations import Duration
from models.noise import NoiseConfig, StochasticDepthConfig
from models.objectives import Batch, Models, ObjectiveState, StepLoss
from models.optimization import EmaConfig, SGDConfig, build_optimizer
from models.ranks import Ranks
from models.training import TrainingConfig, TrainingState, initial_state, train

NUM_CLASSES = 3
BATCH_SIZE = 8
STEPS = 5


class BalancedCrossEntropy:
    """Cross entropy in float64 over classes weighted against their share of past predictions.

    Its state is what every rank must agree on, and moves by the mean over a step's images.
    """

    def init_state(self, num_classes: int) -> ObjectiveState:
        return {"share": torch.full((num_classes,), 1 / num_classes, dtype=torch.float64)}

    def loss(
        self, models: Models, batch: Batch, state: ObjectiveState, step: int, total_steps: int
    ) -> StepLoss:
        logits: Tensor = models.student(batch.images)
        log_probs = logits.log_softmax(1)[: len(batch.labels)]
        picked = log_probs.gather(1, batch.labels[:, None])[:, 0]
        loss = -(picked / (state["share"][batch.labels] + 0.1)).mean()
        share = logits.detach().softmax(1).mean(0)
        return StepLoss(loss, {"labeled_loss": loss.detach()}, {"share": share})

    def next_state(self, state: ObjectiveState, statistics: dict[str, Tensor]) -> ObjectiveState:
        return {"share": 0.5 * state["share"] + 0.5 * statistics["share"]}


def next_batch(step: int, part: int, num_parts: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    images = torch.rand((BATCH_SIZE, 3, 8, 8), generator=generator, dtype=torch.float64)
    labels = torch.randint(NUM_CLASSES, (BATCH_SIZE,), generator=generator)
    images[torch.arange(BATCH_SIZE), labels] += 1
    per_part = BATCH_SIZE // num_parts
    own = slice(part * per_part, (part + 1) * per_part)
    return Batch(images[own], labels[own])


def config(*, accumulation_steps: int, noise: NoiseConfig) -> TrainingConfig:
    return TrainingConfig(
        architecture=SmallCnnConfig(width=4),
        image_size=8,
        batch_size=BATCH_SIZE,
        unlabeled_ratio=0,
        accumulation_steps=accumulation_steps,
        duration=Duration(steps=STEPS),
        optimizer=SGDConfig(lr=0.1),
        noise=noise,
        ema=EmaConfig(decay=0.5),
        gradient_clip_norm=1.0,
    )


def state_without_batchnorm(cfg: TrainingConfig) -> TrainingState:
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        network = nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.Tanh(), nn.Linear(5, 3))
    model = Classifier(network, Normalization())
    state = initial_state(cfg, NUM_CLASSES, seed=5, device="cpu")
    return TrainingState(
        model=model,
        ema=None,
        optimizer=build_optimizer(cfg.optimizer, model),
        objective_state=state.objective_state,
        step=0,
    )


def trained(state: TrainingState, cfg: TrainingConfig, ranks: Ranks) -> dict[str, Tensor]:
    """Train, and return the state, the reported losses and the number of gradient reductions."""
    state.model.double()
    if state.ema is not None:
        state.ema.double()
    reductions: list[int] = []
    model = None
    if ranks.world_size > 1:
        model = DistributedDataParallel(state.model, broadcast_buffers=False)

        def reduce(
            group: None,
            bucket: dist.GradBucket,  # pyright: ignore[reportPrivateImportUsage]
        ) -> torch.futures.Future[Tensor]:
            reductions.append(1)
            future = dist.all_reduce(bucket.buffer().div_(ranks.world_size), async_op=True)
            assert future is not None
            return future.get_future().then(lambda done: done.value()[0])

        model.register_comm_hook(None, reduce)
    reports = list(
        train(
            state,
            cfg,
            next_batch,
            total_steps=STEPS,
            num_labeled=40,
            layer_seed=7,
            forward_model=model,
            ranks=ranks,
        )
    )
    losses = torch.tensor([[r.loss, r.logs["labeled_loss"]] for r in reports], dtype=torch.float64)
    return state.tensors() | {"losses": losses, "reductions": torch.tensor(len(reductions))}


def main() -> None:
    rank, world_size = int(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    models.training.build_objective = lambda *_: BalancedCrossEntropy()  # type: ignore[reportAttributeAccessIssue]
    models.training_state.build_objective = lambda *_: BalancedCrossEntropy()  # type: ignore[reportAttributeAccessIssue]
    if world_size > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{sys.argv[3]}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )
    ranks = Ranks(rank, world_size)
    layer_noise = NoiseConfig(
        dropout=0.3, stochastic_depth=StochasticDepthConfig(rate=0.5, rule="linear_huang")
    )
    noisy = config(accumulation_steps=4, noise=layer_noise)
    plain = config(accumulation_steps=1, noise=NoiseConfig())
    found: dict[str, Tensor] = {}
    for name, cfg, state in (
        ("batchnorm", noisy, initial_state(noisy, NUM_CLASSES, seed=5, device="cpu")),
        ("joint", plain, state_without_batchnorm(plain)),
    ):
        for key, value in trained(state, cfg, ranks).items():
            found[f"{name}/{key}"] = value
    save_file(found, sys.argv[4])


if __name__ == "__main__":
    main()
