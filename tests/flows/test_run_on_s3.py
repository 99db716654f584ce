"""The whole loop with corpora and store on S3, workers in processes of their own."""

from collections.abc import Callable
from pathlib import Path

import pytest

from flows.config import SelfTrainingConfig
from flows.run_status import RunStatus, read_status
from flows.self_training import self_training
from storage.objects import join_url, write_object
from storage.runs import list_runs
from storage.store import Store, open_store
from tasks.classifiers import model_manifest
from tasks.specifications import read_result

pytestmark = [pytest.mark.s3, pytest.mark.timeout(600)]

MakeConfig = Callable[..., SelfTrainingConfig]


def test_run_on_s3_commits_the_same_manifests_and_weights_as_a_local_one(
    tmp_path: Path,
    prefect_api: str,
    bucket: str,
    corpora_folder: Path,
    tiny_config: MakeConfig,
) -> None:
    for path in sorted(corpora_folder.rglob("*")):
        if path.is_file():
            relative = path.relative_to(corpora_folder).as_posix()
            write_object(join_url(bucket, f"corpora/{relative}"), path.read_bytes())
    remote, local = f"{bucket}/some/prefix", str(tmp_path / "store")
    short = ("rounds=1", "baseline=false")

    returned = self_training(tiny_config(remote, *short, data=f"{bucket}/corpora"))
    self_training(tiny_config(local, *short))

    on_s3, on_disk = open_store(remote), open_store(local)
    status = read_status(on_s3, "tiny")
    assert returned == status.to_json()
    assert status.state == "done"
    assert list_runs(on_s3) == ["tiny"]
    # A manifest holds the checksum of every object, of every input, and nothing of time and place.
    theirs = _manifests(on_s3, status)
    assert theirs == _manifests(on_disk, read_status(on_disk, "tiny"))
    assert len(theirs) == 9
    assert status.model_url == f"{remote}/models/{status.model_fingerprint()}"
    model = model_manifest(on_s3, status.model_fingerprint()).object("model")
    assert model.path.endswith(f"model-{model.sha256}.safetensors")

    again = self_training(tiny_config(remote, *short, data=f"{bucket}/corpora"), return_state=True)
    assert again.is_completed()
    stages = [stage for one in read_status(on_s3, "tiny").rounds for stage in one.stages]
    assert {stage["state"] for stage in stages} == {"reused"}


def _manifests(store: Store, status: RunStatus) -> dict[tuple[str, str], str]:
    """Return kind and fingerprint -> checksum of the manifest, for every stage of a run."""
    found: dict[tuple[str, str], str] = {}
    for one in status.rounds:
        for stage in one.stages:
            manifest = read_result(store, stage["kind"], stage["fingerprint"])
            assert manifest is not None
            found[stage["kind"], stage["fingerprint"]] = manifest.sha256
    return found
