"""Does labelling on one GPU run at the speed of its slower half, decoding or network?

Photographs of ImageNet, replicated into shards on the local disk, by networks of random weights in
bf16 at 224 pixels: the stage is `label_corpus`, from the store to Parquet in the store. Decoding on
the CPU and the network on the GPU run side by side, so that the ideal is the slower of the two.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")

import torch

from benchmarks.figures import Figure, benchmark_parser, figure, print_figures
from benchmarks.references import labeling_gpu_speeds
from benchmarks.references.labeling_data import (
    PHOTOGRAPHS,
    PhotographStore,
    make_store,
    put_network,
)
from benchmarks.references.labeling_speeds import num_processes
from flows.labeling import label_corpus
from flows.server import prefect_server
from tasks.labeling import LabelingConfig

_NETWORKS = ("resnet50", "efficientnet_b0")
_SHARD_SIZE = 400
_BATCH_SIZES = (128, 512, 1024)


def main() -> None:
    parser = benchmark_parser(__doc__, quick="10 shards")
    parser.add_argument("--shards", type=int, default=1000, help=f"of {_SHARD_SIZE} photographs")
    parser.add_argument(
        "--photographs", type=Path, default=PHOTOGRAPHS, help="archive that is replicated"
    )
    options = parser.parse_args()
    figures: list[Figure] = []
    if not torch.cuda.is_available():
        print("nothing is measured without a CUDA device", file=sys.stderr)
    elif not options.photographs.exists():
        print(f"nothing is measured without {options.photographs.name}", file=sys.stderr)
    else:
        with tempfile.TemporaryDirectory(prefix="selftrain-labeling-") as folder:
            figures = _figures(
                Path(folder),
                options.photographs,
                10 if options.quick else options.shards,
                options.quick,
            )
    print_figures(figures, as_json=options.json)


def _figures(folder: Path, source: Path, num_shards: int, quick: bool) -> list[Figure]:
    made = make_store(folder, num_shards=num_shards, shard_size=_SHARD_SIZE, source=source)
    some = max(10, num_shards // 10)
    decode = labeling_gpu_speeds.stage_decoding(
        made.store.url, made.corpus.digest, batch_size=_SHARD_SIZE, num_shards=some
    )
    print(f"decoding alone: {decode:.0f} images/s", file=sys.stderr)
    on_gpu = labeling_gpu_speeds.gpu_decoding(sorted(made.shards.glob("*.tar"))[:some])
    print(f"decoding on the GPU: {on_gpu:.0f} images/s", file=sys.stderr)
    figures: list[Figure] = []
    with prefect_server():
        for name in _NETWORKS:
            figures.append(_efficiency(made, name, folder / name, decode, quick))
    cores = f"{num_processes()} cores"
    return [
        *figures,
        figure(
            "labeling_gpu_jpeg_decoding",
            on_gpu / decode,
            "x",
            goal=1.0,
            direction="at_least",
            against=f"the stage's decoding and resizing on {cores}, {decode:.0f} images/s; "
            f"torchvision's decode_jpeg and resizing on the GPU alone, {on_gpu:.0f} images/s",
            quick=quick,
            seeds=[0],
        ),
    ]


def _efficiency(
    made: PhotographStore, name: str, folder: Path, decode: float, quick: bool
) -> Figure:
    forward, how = labeling_gpu_speeds.best_forward(
        name, batch_sizes=_BATCH_SIZES, seconds=0.3 if quick else 1.0
    )
    model = put_network(made.store, name, folder)
    started = time.monotonic()
    config = LabelingConfig(form="full", precision="bf16")
    label_corpus(made.store.url, model, made.corpus.digest, config, device="cuda")
    stage = made.corpus.num_samples / (time.monotonic() - started)
    bottleneck = "decoding" if decode < forward else "the network"
    print(f"{name}: stage {stage:.0f}, network {forward:.0f} images/s ({how})", file=sys.stderr)
    return figure(
        f"labeling_gpu_efficiency_{name}",
        stage / min(decode, forward),
        "of the ideal",
        goal=0.9,
        direction="at_least",
        against=f"min(decoding, network), here {bottleneck}; stage {stage:.0f}, decoding alone"
        f" {decode:.0f} on {num_processes()} cores, network alone {forward:.0f} images/s ({how});"
        f" {torch.cuda.get_device_name()}, {made.corpus.num_samples} photographs",
        quick=quick,
        seeds=[0],
    )


if __name__ == "__main__":
    main()
