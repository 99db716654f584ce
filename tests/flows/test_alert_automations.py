"""An alert on its way: from a run's event through the server's automation to a webhook."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Empty, Queue
from typing import Any

import pytest
from prefect.blocks.webhook import Webhook
from pydantic import SecretStr

from flows.deploying import Pools, deploy
from flows.loading import load_config
from flows.run_events import WORSE, emit_run_event, related_to


@pytest.fixture
def hook() -> Iterator[tuple[str, "Queue[dict[str, Any]]"]]:
    """The URL of a webhook on loopback, and what it is sent."""
    received: Queue[dict[str, Any]] = Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.put(json.loads(body))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", received
    server.shutdown()
    server.server_close()


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_api")
def test_a_worse_student_is_alerted_of_through_the_webhook_of_its_own_config(
    hook: tuple[str, "Queue[dict[str, Any]]"],
) -> None:
    url, received = hook
    Webhook(url=SecretStr(url)).save("students", overwrite=True)
    overrides = ["store=/s", "alert.notify=webhook/students"]
    config = load_config("supervised", name="hooked", overrides=overrides)
    deployed = deploy(config, Pools("unattended", "unattended"))
    ours = related_to(None, None, deployed.deployments[0]["id"])
    others = related_to(None, None, "00000000-0000-0000-0000-000000000000")

    body = None
    deadline = time.monotonic() + 60
    while body is None:
        assert time.monotonic() < deadline, "no alert came"
        # Again and again, because the server takes a moment to see to an automation that is new.
        for run, related in (("foreign", others), ("hooked", ours)):
            payload = {"round_index": 2, "difference": -0.1, "interval": [-0.2, -0.01]}
            emit_run_event(WORSE, run=run, store='/"s"', payload=payload, related=related)
        try:
            body = received.get(timeout=5)
        except Empty:
            continue

    assert body["event"] == "selftrain.round.worse"
    assert body["resource"]["prefect.resource.id"] == "selftrain.run.hooked", (
        "not of another config"
    )
    assert body["payload"] == {
        "run": "hooked",
        "store": '/"s"',
        "round_index": 2,
        "difference": -0.1,
        "interval": [-0.2, -0.01],
    }
    assert body["occurred"].startswith("20")
