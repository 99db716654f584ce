"""The Prefect server of a run: the one that is configured, or a real process of our own."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.filters import FlowRunFilterId as ById
from prefect.client.schemas.filters import FlowRunFilterParentFlowRunId as ByParent
from prefect.client.schemas.objects import State
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
    PREFECT_SERVER_ALLOW_EPHEMERAL_MODE,
    temporary_settings,
)

from flows.prefect_checks import version_of_server
from tasks.children import die_with_parent, stop_process_group

START_TIMEOUT_SECONDS = 120
DRAIN_TIMEOUT_SECONDS = 30

# Task states reach the server's database in batches: larger ones keep up with larger fan-outs. A
# batch that does not fill is written after the flush interval.
_FLUSH_SECONDS = 1
_SERVER_SETTINGS = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": str(_FLUSH_SECONDS),
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_BATCH_SIZE": "200",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_FLUSH_INTERVAL": str(_FLUSH_SECONDS),
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": (
        "prefect.server.concurrency.lease_storage.filesystem"
    ),
}


@dataclass(frozen=True)
class PrefectServer:
    """A reachable Prefect API; `is_ours` when this process started it and will stop it."""

    api_url: str
    is_ours: bool

    @property
    def ui_url(self) -> str:
        """Address of the UI."""
        return self.api_url.removesuffix("/api")


class ServerNotStarted(RuntimeError):
    """The Prefect server process ended or did not answer in time."""


@contextmanager
def prefect_server(
    *, port: int | None = None, settings: Mapping[str, str] | None = None
) -> Iterator[PrefectServer]:
    """Yield the server that PREFECT_API_URL names, or start one and stop it afterwards.

    Ours is a process of its own on loopback, on the database of the user's PREFECT_HOME, so that
    `selftrain ui` shows the run later. It dies with this process, also under kill -9. The embedded
    server of Prefect is not used: it stops before its queue of task states is empty.

    Args:
        port: to listen on; a free one by default.
        settings: environment variables of a server of ours, which go before those it has anyway.
    Raises: ServerOutOfReach, naming the remedy; ServerNotStarted.
    """
    configured = PREFECT_API_URL.value()
    if configured:
        version_of_server(configured)
        yield PrefectServer(api_url=configured, is_ours=False)
        return
    port = port or free_port()
    log_path = Path(mkdtemp(prefix="selftrain-prefect-")) / "server.log"
    with log_path.open("wb") as log:
        process = start_server_process(port, log, settings=settings)
        try:
            api_url = f"http://127.0.0.1:{port}/api"
            wait_until_healthy(api_url, process, log_path=log_path)
            with temporary_settings(
                {
                    PREFECT_API_URL: api_url,
                    PREFECT_SERVER_ALLOW_EPHEMERAL_MODE: False,
                    # Nobody watches this server for lost machines, and heartbeats cost a second
                    # a flow.
                    PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,
                }
            ):
                try:
                    yield PrefectServer(api_url=api_url, is_ours=True)
                finally:
                    # What is queued here would be retried for minutes once the server is gone.
                    _send_what_is_queued()
        finally:
            stop_process_group(process, grace_seconds=20)


def start_server_process(
    port: int, log: Any, *, settings: Mapping[str, str] | None = None
) -> "subprocess.Popen[bytes]":
    """Start Prefect's API and UI on 127.0.0.1:`port`; its output goes to the open file `log`."""
    command = [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--timeout-keep-alive", "5"]
    environment = {
        **os.environ,
        **_SERVER_SETTINGS,
        **(settings or {}),
        "PREFECT_SERVER_API_HOST": "127.0.0.1",
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_UI_API_URL": f"http://127.0.0.1:{port}/api",
    }
    environment.pop("PREFECT_API_URL", None)
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )


def wait_until_recorded(
    flow_run_id: str, *, at_least: int = 0, timeout_seconds: float = DRAIN_TIMEOUT_SECONDS
) -> bool:
    """Return whether the API holds a final state of the flow run, its subflows and their tasks.

    Task states travel as events and arrive late: a server stopped at once would show a finished
    run with tasks `Running`, or without them, for ever.

    Args:
        flow_run_id: a flow run of this process that has ended.
        at_least: task runs that the flow itself is known to have begun; a subflow counts as one.
            A task run whose events are still on their way is not in the API at all.
        timeout_seconds: after which the answer is False.
    """
    _send_what_is_queued()
    deadline = time.monotonic() + timeout_seconds
    unchanged_since, previous = time.monotonic(), -1
    with get_client(sync_client=True) as client:
        while time.monotonic() < deadline:
            found = _family(client, UUID(flow_run_id))
            if len(found.states) != previous:
                unchanged_since, previous = time.monotonic(), len(found.states)
            is_complete = found.num_own_tasks >= at_least and found.are_final
            if is_complete and time.monotonic() - unchanged_since > _FLUSH_SECONDS:
                return True
            time.sleep(0.25)
    return False


def _send_what_is_queued() -> None:
    EventsWorker.drain_all(timeout=10)
    APILogWorker.drain_all(timeout=10)


@dataclass(frozen=True)
class _Family:
    """The states of a flow run, its subflows and all their task runs, as the API shows them."""

    states: list[State | None]
    num_own_tasks: int

    @property
    def are_final(self) -> bool:
        return all(state is not None and state.is_final() for state in self.states)


def _family(client: SyncPrefectClient, flow_run_id: UUID) -> _Family:
    children = FlowRunFilter(parent_flow_run_id=ByParent(any_=[flow_run_id]))
    subflows = client.read_flow_runs(flow_run_filter=children)
    ids = [flow_run_id, *(run.id for run in subflows)]
    family = FlowRunFilter(id=ById(any_=ids))
    states = [client.read_flow_run(flow_run_id).state, *(run.state for run in subflows)]
    num_tasks = num_own = 0
    while page := client.read_task_runs(flow_run_filter=family, limit=200, offset=num_tasks):
        num_tasks += len(page)
        num_own += sum(run.flow_run_id == flow_run_id for run in page)
        states.extend(run.state for run in page)
    return _Family(states, num_own)


def wait_until_healthy(
    api_url: str, process: "subprocess.Popen[bytes]", *, log_path: Path | None
) -> None:
    """Wait until the API answers.

    Raises: ServerNotStarted with the end of the log, if the process ends or time runs out.
    """
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"{api_url}/health", timeout=2).is_success:
                return
        except httpx.HTTPError:
            pass  # not listening yet; the deadline and the process's end bound the wait
        time.sleep(0.2)
    log = "" if log_path is None else f" Its log, {log_path}, ends:\n{_tail(log_path)}\n"
    raise ServerNotStarted(
        f"the Prefect server on {api_url} did not start within {START_TIMEOUT_SECONDS} s"
        f" (exit code {process.poll()}).{log} Set PREFECT_API_URL to use a server that runs already"
    )


def _tail(path: Path) -> str:
    return path.read_text(errors="replace")[-2000:]


def free_port() -> int:
    """Return a port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
