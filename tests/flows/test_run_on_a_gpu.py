"""A whole run on a CUDA device, its workers included."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flows.config import SelfTrainingConfig
from flows.run_status import read_status
from flows.self_training import self_training
from storage.runs import list_runs
from storage.store import open_store

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("prefect_api")]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("processes", [0, 1])
def test_a_run_trains_labels_and_evaluates_there(
    tmp_path: Path, tiny_config: Callable[..., SelfTrainingConfig], processes: int
) -> None:
    store = tmp_path / "store"
    engine = f"engine.processes={processes}"
    # How good a network of twenty steps is depends on the device's random numbers.
    lenient = "selection={threshold: {kind: fixed, confidence: 0.4}, allow_collapse: true}"
    self_training(tiny_config(store, "device=cuda", "labeling={precision: bf16}", engine, lenient))

    opened = open_store(str(store))
    (run,) = list_runs(opened)
    status = read_status(opened, run)
    assert status.state == "done"
    provenances = [path.read_text() for path in store.glob("models/*/provenance.json")]
    assert len(provenances) >= 3
    assert all(torch.cuda.get_device_name() in text for text in provenances)
