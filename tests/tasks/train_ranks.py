"""Trainings in float64 as one of several ranks: `python train_ranks.py FOLDER`, RANK and so on set.

Writes what this rank ended with and which parts of which steps it asked for to
FOLDER/<ranks>-<rank>.pt. A program of its own, because ranks are processes.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from models.architectures import SmallCnnConfig, WideResNetConfig
from models.durations import Duration
from models.noise import NoiseConfig
from models.objectives import Batch, FixMatchConfig, JointConfig
from models.objectives.fixmatch import DebiasConfig
from models.objectives.joint import DecoupledHeadConfig
from models.optimization import EmaConfig, SGDConfig, SwaConfig
from models.training import StepReport, TrainingConfig, finish, initial_state, train
from tasks.process_group import joined_group

STEPS, LABELED, RATIO, CLASSES = 20, 4, 2, 3

Asked = list[tuple[int, ...]]


# With GroupNorm a step is one joint batch; with BatchNorm it is two micro-batches, each a group.
_GROUP = {
    "architecture": WideResNetConfig(depth=10, width=1, norm="group"),
    "accumulation_steps": 1,
}
_BATCH = {"architecture": SmallCnnConfig(width=4, depth=1), "accumulation_steps": 2}
CASES: dict[str, dict[str, Any]] = {
    "group": _GROUP,
    "batch": _BATCH,
    # A state that is a mean over all ranks' images, and parameters beside the network's.
    "fixmatch": _GROUP
    | {"objective": FixMatchConfig(threshold=0.3, debias=DebiasConfig(momentum=0.9))},
    # The mean of weights gets BatchNorm statistics from the parts of all ranks.
    "swa": _BATCH | {"swa": SwaConfig(start_fraction=0.5)},
    "decoupled": _BATCH | {"objective": JointConfig(decoupled_head=DecoupledHeadConfig())},
}


def config_of(case: str) -> TrainingConfig:
    """Twenty steps without dropout, whose draws are per part."""
    settings: dict[str, Any] = {
        "image_size": 8,
        "batch_size": LABELED,
        "unlabeled_ratio": RATIO,
        "duration": Duration(steps=STEPS),
        "optimizer": SGDConfig(lr=0.1, momentum=0.9),
        "gradient_clip_norm": 1.0,
        "ema": EmaConfig(decay=0.6),
        "noise": NoiseConfig(),
    }
    return TrainingConfig(**settings | CASES[case])


def batch_of(case: str, step: int, part: int, num_parts: int) -> Batch:
    """The p-th slice of each stream of a step; images and soft targets are drawn by the step."""
    generator = torch.Generator().manual_seed(step)
    images = torch.rand(LABELED * (1 + RATIO), 3, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (LABELED,), generator=generator)
    targets = torch.rand(LABELED * RATIO, CLASSES, generator=generator, dtype=torch.float64)
    mine = slice(part * LABELED // num_parts, (part + 1) * LABELED // num_parts)
    own = slice(mine.start * RATIO, mine.stop * RATIO)
    if case == "fixmatch":
        weak = images[LABELED:][own]
        views = {"unlabeled_weak": weak, "unlabeled_strong": 1 - weak}
        return Batch(images[:LABELED][mine], labels[mine], views=views)
    return Batch(
        torch.cat([images[:LABELED][mine], images[LABELED:][own]]),
        labels[mine],
        pseudo_targets=(targets / targets.sum(1, keepdim=True))[own],
    )


def trained(case: str, group: Any, ask: Callable[[int, int, int], Batch]) -> dict[str, Any]:
    """Train and return weights, averages and buffers by name, and the losses."""
    config = config_of(case)
    # Other weights on every rank but the first: they must not matter.
    state = initial_state(config, CLASSES, seed=group.ranks.rank, device="cpu")
    for module in (state.model, state.ema, state.swa):
        if module is not None:
            module.double()
    group.share_state(state)
    reports: list[StepReport] = list(
        train(
            state,
            config,
            ask,
            total_steps=STEPS,
            num_labeled=100,
            layer_seed=7,
            forward_model=group.wrap(
                state, accumulation_steps=config.accumulation_steps, device=torch.device("cpu")
            ),
            ranks=group.ranks,
        )
    )
    finish(state, config, ask, total_steps=STEPS, ranks=group.ranks)
    return {"tensors": state.tensors(), "losses": [report.loss for report in reports]}


def main(folder: Path) -> None:
    """Train every case and say what was found."""
    torch.set_num_threads(1)
    with joined_group("cpu") as (group, _):
        rank, world_size = group.ranks.rank, group.ranks.world_size
        found: dict[str, Any] = {"asked": {}}
        for case in CASES:
            asked: Asked = []

            def ask(*place: int, case: str = case, into: Asked = asked) -> Batch:
                into.append(place)
                return batch_of(case, *place)

            found[case] = trained(case, group, ask)
            found["asked"][case] = asked
        found["any"] = [group.any(rank == 1), group.any(False)]
        found["share"] = group.share(f"of rank {rank}")
        found["gather"] = group.gather(rank)
        torch.save(found, folder / f"{world_size}-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
