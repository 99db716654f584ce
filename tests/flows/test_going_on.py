"""A deployed run that was answered goes on by its deployment, and not where it was answered."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.client.schemas.objects import FlowRun, State
from prefect.flow_engine import run_flow
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Running
from typer.testing import CliRunner

from flows.approvals import answer
from flows.approving import ApprovalForm, approve
from flows.cli import app
from flows.config import SelfTrainingConfig
from flows.deploying import Pools, deploy
from flows.going_on import DeploymentOutOfReach, go_on_by_deployment
from flows.opening import open_run
from flows.run_status import read_status
from flows.self_training import self_training
from storage.runs import append_event, read_events
from storage.store import Store, open_store

MakeConfig = Callable[..., SelfTrainingConfig]


@pytest.fixture
def client(prefect_api: str) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as opened:
        yield opened


@pytest.fixture
def config(
    tiny_config: MakeConfig, tmp_path: Path, request: pytest.FixtureRequest
) -> SelfTrainingConfig:
    """A run that asks before it promotes, under the test's own name: all tests share a server."""
    name = request.node.name.replace("_", "-")[-40:].strip("-")
    options = ["approve=promotion", "rounds=1", "baseline=false"]
    return tiny_config(tmp_path / "store", *options, name=name)


@pytest.fixture
def deployment(client: SyncPrefectClient, config: SelfTrainingConfig) -> UUID:
    """The deployment of the run, on a work pool that nobody works on."""
    pools = Pools("unattended", "unattended")
    return UUID(deploy(config, pools, with_automations=False).deployments[0]["id"])


def flow_runs_of(client: SyncPrefectClient, deployment: UUID) -> list[FlowRun]:
    chosen = DeploymentFilter(id=DeploymentFilterId(any_=[deployment]))
    return client.read_flow_runs(deployment_filter=chosen)


def carried_out(client: SyncPrefectClient, flow_run_id: UUID) -> State:
    """Carry out a flow run of a deployment in this process, as the process of a worker would."""
    flow_run = client.read_flow_run(flow_run_id)
    state: Any = run_flow(
        self_training,
        flow_run=flow_run,
        parameters=flow_run.parameters,
        return_type="state",
    )
    return state


def asked(
    client: SyncPrefectClient, config: SelfTrainingConfig, deployment: UUID, *, state: State
) -> FlowRun:
    """Return a flow run of the deployment that has asked, without what it would have computed."""
    flow_run = client.create_flow_run_from_deployment(deployment)
    store = store_of(config)
    open_run(store, config)
    append_event(
        store,
        config.name,
        "run_waiting",
        question="promotion",
        round_index=1,
        model="5" * 64,
        flow_run=str(flow_run.id),
        deployment=str(deployment),
    )
    client.set_flow_run_state(flow_run.id, state, force=True)
    return flow_run


def store_of(config: SelfTrainingConfig) -> Store:
    assert config.store is not None
    return open_store(config.store)


@pytest.mark.usefixtures("trained_here")
def test_an_answered_run_goes_on_in_a_flow_run_of_its_deployment(
    client: SyncPrefectClient, config: SelfTrainingConfig, deployment: UUID
) -> None:
    store = store_of(config)
    first = client.create_flow_run_from_deployment(deployment)
    assert carried_out(client, first.id).name == "WaitingForApproval"
    (waiting,) = [e for e in read_events(store, config.name) if e["type"] == "run_waiting"]
    assert (waiting["flow_run"], waiting["deployment"]) == (str(first.id), str(deployment))
    form = ApprovalForm(run=config.name, store=store.url, by="ada@lab", answer="accept")

    state = approve(form, return_state=True)

    assert state.name == "GoesOn"
    (second,) = [one for one in flow_runs_of(client, deployment) if one.id != first.id]
    assert str(second.id) in str(state.message)
    assert second.state is not None
    assert second.state.is_scheduled()
    assert (second.name, second.work_pool_name) == (config.name, "unattended")
    assert second.parameters == first.parameters
    assert "selftrain" in second.tags
    assert read_status(store, config.name).state == "stopped", "not gone on with here"

    again = CliRunner().invoke(app, ["approve", config.name, "--store", store.url])

    assert again.exit_code == 0, again.stderr
    assert f"goes on already, in flow run {second.id}" in again.stderr
    assert len(flow_runs_of(client, deployment)) == 2

    assert carried_out(client, second.id).name == "Completed"
    assert read_status(store, config.name).state == "done"


def test_a_scheduled_run_goes_on_under_the_name_it_has_in_the_store(
    client: SyncPrefectClient,
    config: SelfTrainingConfig,
    deployment: UUID,
) -> None:
    nightly = config.model_copy(update={"name": f"{config.name}-20260101t020000z"})
    first = asked(client, nightly, deployment, state=Completed(name="WaitingForApproval"))
    assert first.parameters["config"]["name"] == config.name

    goes_on = go_on_by_deployment(store_of(nightly), nightly.name)

    assert goes_on is not None
    second = client.read_flow_run(UUID(goes_on.flow_run))
    assert (second.name, second.parameters["config"]["name"]) == (nightly.name, nightly.name)


def test_the_flow_run_that_asked_and_has_not_ended_yet_does_not_go_on(
    client: SyncPrefectClient, config: SelfTrainingConfig, deployment: UUID
) -> None:
    first = asked(client, config, deployment, state=Running())
    client.update_flow_run(first.id, name=config.name)

    goes_on = go_on_by_deployment(store_of(config), config.name)

    assert goes_on is not None
    assert goes_on.is_new
    assert goes_on.flow_run != str(first.id)


def test_an_answer_is_kept_where_the_deployment_is_gone_or_no_server_is_set(
    client: SyncPrefectClient, config: SelfTrainingConfig, deployment: UUID
) -> None:
    asked(client, config, deployment, state=Completed(name="WaitingForApproval"))
    store = store_of(config)
    given, _ = answer(store, config.name, "accept", by="ada@lab")
    form = ApprovalForm(run=config.name, store=store.url, by="ada@lab", answer="accept")
    client.delete_deployment(deployment)

    with pytest.raises(DeploymentOutOfReach, match=f"selftrain resume {config.name} --store"):
        approve(form)
    with (
        temporary_settings(restore_defaults={PREFECT_API_URL}),
        pytest.raises(DeploymentOutOfReach, match="set PREFECT_API_URL"),
    ):
        go_on_by_deployment(store, config.name)
    with (
        temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}),
        pytest.raises(DeploymentOutOfReach, match="does not answer: ConnectError"),
    ):
        go_on_by_deployment(store, config.name)

    assert answer(store, config.name, "accept", by="bob@lab") == (given, False)
    assert "run_started" not in [event["type"] for event in read_events(store, config.name)]


def test_a_run_that_no_deployment_made_goes_on_where_it_is_answered(
    config: SelfTrainingConfig,
) -> None:
    store = store_of(config)
    open_run(store, config)
    for question in ({}, {"flow_run": "f", "deployment": "d"}, {}):  # the last one counts
        append_event(
            store, config.name, "run_waiting", question="promotion", round_index=1, **question
        )

    assert go_on_by_deployment(store, config.name) is None
