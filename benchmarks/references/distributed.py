"""Two processes against one: how far their weights differ, and how much faster they are.

Run by itself, this file is one process (`python -m benchmarks.references.distributed ...`), and
under torchrun each of several.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from models.architectures import WideResNetConfig
from models.durations import Duration
from models.objectives import Batch
from models.optimization import EmaConfig, SGDConfig
from models.training import TrainingConfig, initial_state, train
from tasks.process_group import joined_group

_NUM_CLASSES = 10
_NUM_PROCESSES = 2


def max_difference(folder: Path, *, depth: int, labeled_batch: int, steps: int) -> float:
    """Return the largest difference of a weight, in float64 after equal steps of equal batches."""
    weights: list[dict[str, torch.Tensor]] = []
    for num_processes in (1, _NUM_PROCESSES):
        path = folder / f"weights-{num_processes}.safetensors"
        _launch(
            num_processes,
            ["--depth", depth, "--batch", labeled_batch, "--steps", steps, "--weights", path],
        )
        weights.append(load_file(path))
    alone, together = weights
    assert alone.keys() == together.keys()
    assert all(value.dtype == torch.float64 for value in alone.values())
    return max(float((alone[name] - together[name]).abs().max()) for name in alone)


def images_per_second(num_processes: int, *, labeled_batch: int, steps: int) -> float:
    """Return the rate of WRN-28-2 in float32, one thread a process, the global batch the same."""
    arguments = ["--depth", 28, "--batch", labeled_batch, "--steps", steps, "--timed"]
    return json.loads(_launch(num_processes, arguments))["images_per_second"]


def _launch(num_processes: int, arguments: list[object]) -> bytes:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    command = [
        sys.executable,
        *(launcher if num_processes > 1 else []),
        "-m",
        "benchmarks.references.distributed",
        *map(str, arguments),
    ]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.run(
        command, env=os.environ | threads, stdout=subprocess.PIPE, check=True
    ).stdout


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--weights", help="train in float64 and write the weights here")
    parser.add_argument("--timed", action="store_true", help="train in float32 and print the rate")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dtype = torch.float32 if options.timed else torch.float64
    config = TrainingConfig(
        # GroupNorm: BatchNorm over several processes needs CUDA.
        architecture=WideResNetConfig(depth=options.depth, norm="group"),
        image_size=32,
        batch_size=options.batch,
        unlabeled_ratio=1,
        duration=Duration(steps=options.steps),
        optimizer=SGDConfig(lr=0.05),
        ema=EmaConfig(decay=0.9),
    )

    def batch(step: int, part: int, num_parts: int) -> Batch:
        return _batch(step, part, num_parts, options.batch, dtype)

    with joined_group("cpu") as (group, device):
        state = initial_state(config, _NUM_CLASSES, seed=0, device=device)
        assert state.ema is not None
        state.model.to(dtype)
        state.ema.to(dtype)
        began = 0.0
        for report in train(
            state,
            config,
            batch,
            total_steps=options.steps,
            num_labeled=options.batch,
            layer_seed=0,
            forward_model=group.wrap(state, accumulation_steps=1, device=device),
            ranks=group.ranks,
        ):
            if report.step == 1:  # it sets up what later steps find
                began = time.perf_counter()
        seconds = time.perf_counter() - began
        if not group.is_first:
            return
        if options.weights is not None:
            save_file(state.tensors(), options.weights)
        if options.timed:
            images = 2 * options.batch * (options.steps - 1)
            print(json.dumps({"images_per_second": images / seconds}))


def _batch(step: int, part: int, num_parts: int, labeled_batch: int, dtype: torch.dtype) -> Batch:
    """Part of a step's noise, which depends on the step alone."""
    made = torch.Generator().manual_seed(step)
    # (2 B_l, 3, 32, 32): labelled images, then as many pseudo-labelled ones.
    images = torch.rand((2 * labeled_batch, 3, 32, 32), generator=made, dtype=torch.float64)
    labels = torch.randint(0, _NUM_CLASSES, (labeled_batch,), generator=made)
    logits = torch.randn((labeled_batch, _NUM_CLASSES), generator=made, dtype=torch.float64)
    share = labeled_batch // num_parts
    own = slice(part * share, (part + 1) * share)
    labeled, pseudo = images[:labeled_batch], images[labeled_batch:]
    return Batch(
        torch.cat([labeled[own], pseudo[own]]).to(dtype),
        labels[own],
        pseudo_targets=logits.softmax(dim=1)[own].to(dtype),
    )


if __name__ == "__main__":
    _main()
