"""One Prefect server for all tests of flows, and runs small enough to be tested whole."""

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

import tasks.stages
from flows.config import SelfTrainingConfig
from flows.loading import load_config
from flows.server import prefect_server
from storage.file_systems import file_system_of
from storage.store import Store
from tasks.devices import DeviceChoice, resolve_device
from tasks.training import run_training
from tasks.training_orders import read_order

# Three classes of 8-pixel images (tests/conftest.py), a network of a few hundred weights, a dozen
# steps: a whole run of two rounds takes seconds and still learns.
_TRAINING = (
    "architecture: {kind: small_cnn, width: 4, depth: 1}, image_size: 8, batch_size: 6,"
    " duration: {steps: 12}, optimizer: {kind: adamw, lr: 0.02}, warmup: {steps: 2},"
    " ema: {decay: 0.6}, noise: {horizontal_flip: true, dropout: 0.2},"
    " checkpoint_every_seconds: null"
)


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the URL of a server on loopback; flows of this process and of children use it.

    The server, its database and its settings are the tests' own: neither a profile nor a server of
    the user is touched. Children get it as PREFECT_API_URL, with everything in os.environ.
    """
    home = tmp_path_factory.mktemp("prefect-home")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("PREFECT_API")]:
            patch.delenv(name)
        patch.setenv("PREFECT_HOME", str(home))
        with (
            temporary_settings({PREFECT_HOME: home}, restore_defaults={PREFECT_API_URL}),
            prefect_server() as server,
        ):
            assert server.is_ours
            patch.setenv("PREFECT_API_URL", server.api_url)
            yield server.api_url


@pytest.fixture(scope="module")
def trained_here() -> Iterator[list[str]]:
    """Train in this process, which spares the start of a worker; yield what was trained."""
    trained: list[str] = []

    def launch(
        store: Store,
        fingerprint: str,
        *,
        device: DeviceChoice,
        on_progress: Callable[[dict[str, Any]], None],
        **launch_options: Any,
    ) -> None:
        trained.append(fingerprint)
        run_training(
            store,
            read_order(store, fingerprint),
            device=resolve_device(device),
            on_report=lambda report, total: on_progress(
                {
                    "step": report.step,
                    "total_steps": total,
                    "loss": report.loss,
                    "learning_rate": report.learning_rate,
                }
            ),
            should_stop=lambda: False,
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks.stages, "launch_worker", launch)
        yield trained


@pytest.fixture(scope="session")
def tiny_config(corpora_folder: Path) -> Callable[..., SelfTrainingConfig]:
    """Return a maker of configs: two rounds on the corpora of tests/conftest.py.

    `tiny_config(store, *overrides, name=..., data=folder)`; overrides are those of `--set`.
    """

    def make(
        store: Path | str, *overrides: str, name: str = "tiny", data: Path | str = corpora_folder
    ) -> SelfTrainingConfig:
        return load_config(
            "demo",
            name=name,
            overrides=[
                f"store={store}",
                "rounds=2",
                f"data={{kind: shards, root: '{data}', labeled: labeled, dev: dev, test: test,"
                " unlabeled: unlabeled}",
                f"teacher={{kind: train, {_TRAINING}}}",
                f"student={{{_TRAINING}, unlabeled_ratio: 2}}",
                "selection={threshold: {kind: fixed, confidence: 0.4}}",
                "device=cpu",
                *overrides,
            ],
        )

    return make


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """Return the URL of a fresh bucket; this process and its children know where it is.

    Its credentials are words that occur nowhere else, so that a test can look for them.
    """
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "canary-key-id-7d1f")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "canary-secret-key-a93e")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        file_system_of("s3").call_s3("create_bucket", Bucket=name)
        yield f"s3://{name}"
    server.stop()
