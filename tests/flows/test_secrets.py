"""Secrets of the environment: in nothing that a run writes, wherever that is."""

import base64
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from flows.approving import ApprovalForm, approve
from flows.config import SelfTrainingConfig
from flows.run_status import read_status
from flows.self_training import self_training
from flows.server import wait_until_recorded
from storage.file_systems import file_system_of
from storage.objects import join_url, write_object
from storage.store import open_store

pytestmark = [pytest.mark.s3, pytest.mark.timeout(600)]

_TOKENS = {
    "MLFLOW_TRACKING_PASSWORD": "canary-tracking-password-51c0",
    "WANDB_API_KEY": "canary-tracking-key-02bb",
    "PREFECT_API_AUTH_STRING": "canary-user:canary-password-6e77",
}


def test_no_secret_is_in_store_prefect_or_terminal(
    tmp_path: Path,
    prefect_api: str,
    bucket: str,
    corpora_folder: Path,
    tiny_config: Callable[..., SelfTrainingConfig],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name, value in _TOKENS.items():
        monkeypatch.setenv(name, value)
    for path in sorted(corpora_folder.rglob("*")):
        if path.is_file():
            relative = path.relative_to(corpora_folder).as_posix()
            write_object(join_url(bucket, f"corpora/{relative}"), path.read_bytes())
    store = f"{bucket}/store"
    short = ("rounds=1", "baseline=false")

    # A run from its start over a question to its end, with workers in processes of their own; and
    # one that fails on data that are not there, because errors quote what they were given.
    config = tiny_config(store, *short, "approve=true", name="canary-run", data=f"{bucket}/corpora")
    runs = [self_training(config, return_state=True)]
    form = ApprovalForm(run="canary-run", store=store, by="somebody", answer="accept")
    runs.append(approve(form, return_state=True))
    assert read_status(open_store(store), "canary-run").state == "done"
    missing = tiny_config(store, *short, name="canary-lost", data=f"{bucket}-missing/corpora")
    runs.append(self_training(missing, return_state=True))
    assert runs[-1].is_failed()
    for run in runs:
        assert wait_until_recorded(str(run.state_details.flow_run_id))

    written = dict(_objects(bucket))
    written |= {f"Prefect's {name}": data for name, data in _api(prefect_api)}
    written |= {str(path): path.read_bytes() for path in _files(Path(os.environ["PREFECT_HOME"]))}
    written |= {str(path): path.read_bytes() for path in _files(tmp_path)}
    shown = capfd.readouterr()
    written |= {"stdout": shown.out.encode(), "stderr": shown.err.encode()}

    # What is looked for would be found: the run's name is in every kind of place.
    with_name = [place for place, data in written.items() if b"canary-run" in data]
    for place in ("config.json", "report.html", "run.json", ".db", "flow_runs", "artifacts"):
        assert any(place in one for one in with_name), place
    assert json.loads(written["Prefect's logs"]), "logs are among it"
    leaks = [
        f"{place}: {name}"
        for place, data in written.items()
        for name, secret in _secrets().items()
        if secret in data or base64.b64encode(secret).rstrip(b"=")[:-1] in data
    ]
    assert not leaks


def _secrets() -> dict[str, bytes]:
    names = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", *_TOKENS]
    return {name: os.environ[name].encode() for name in names}


def _objects(bucket: str) -> Iterator[tuple[str, bytes]]:
    files: Any = file_system_of("s3")
    files.invalidate_cache()
    for path in files.find(bucket):
        yield f"s3://{path}", files.cat_file(path)


def _api(api_url: str) -> Iterator[tuple[str, bytes]]:
    """Yield what the API tells of all runs, page by page joined into one JSON list."""
    with httpx.Client(base_url=api_url, timeout=60) as client:
        for name in ("flow_runs", "task_runs", "logs", "artifacts", "events", "deployments"):
            found: list[Any] = []
            while True:
                page = {"limit": 200, "offset": len(found)}
                answer = client.post(f"/{name}/filter", json={} if name == "events" else page)
                body = answer.raise_for_status().json()
                if name == "events":
                    found += body["events"]
                    break
                found += body
                if len(body) < 200:
                    break
            yield name, json.dumps(found).encode()


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())
