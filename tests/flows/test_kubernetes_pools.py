"""Base job templates: a real server takes them, and what is made of them is a valid Job."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import kubernetes_validate
import pytest
import yaml
from prefect.client.schemas.objects import FlowRun
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

from flows.config import SelfTrainingConfig
from flows.run_status import read_status
from storage.addresses import model_folder
from storage.manifest import read_provenance
from storage.runs import list_runs
from storage.store import open_store

INFRA = Path(__file__).parents[2] / "infra"
TEMPLATES = {
    name: INFRA / "kubernetes" / f"{name}-base-job-template.json" for name in ("gpu", "cpu")
}
RUN = FlowRun(
    id=UUID(int=1), name="nightly-20261126t020000z", flow_id=UUID(int=2), created=None, updated=None
)


class Patient(httpx.HTTPTransport):
    """Asks again where the server's SQLite was busy (503), as Prefect's own clients do."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        deadline = time.monotonic() + 120
        while (response := super().handle_request(request)).status_code == 503:
            if time.monotonic() > deadline:
                break
            response.close()
            time.sleep(1)
        return response


@pytest.fixture(scope="module")
def api(prefect_api: str) -> Iterator[httpx.Client]:
    """The server's API, with a work pool of each template."""
    # As docs/operations.md says; the other one without the start of a program.
    command = ["prefect", "work-pool", "create", "k8s-gpu", "--type", "kubernetes"]
    done = subprocess.run(
        [sys.executable, "-m", *command, "--base-job-template", str(TEMPLATES["gpu"])],
        env=os.environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with httpx.Client(base_url=prefect_api, timeout=60, transport=Patient()) as client:
        template = json.loads(TEMPLATES["cpu"].read_text())
        body = {"name": "k8s-cpu", "type": "kubernetes", "base_job_template": template}
        client.post("/work_pools/", json=body).raise_for_status()
        yield client


def base_job_template(api: httpx.Client, name: str) -> dict[str, Any]:
    return api.get(f"/work_pools/k8s-{name}").raise_for_status().json()["base_job_template"]


def job_of(template: dict[str, Any], *, flow_run: FlowRun = RUN, **values: Any) -> dict[str, Any]:
    """The Job that Prefect's worker would make, without the two fields that no pod has.

    Prefect refuses a template without parallelism and completions in its pod (3.8.8), where
    Kubernetes drops them.
    """

    async def rendered() -> Any:
        return await KubernetesWorkerJobConfiguration.from_template_and_values(
            base_job_template=template, values=values
        )

    configuration = asyncio.run(rendered())
    configuration.prepare_for_flow_run(flow_run)
    job = configuration.job_manifest
    pod = job["spec"]["template"]["spec"]
    assert (pod.pop("parallelism"), pod.pop("completions")) == (1, 1)
    return job


def deploy(
    api: httpx.Client, pool: str, job_variables: dict[str, Any], **parameters: Any
) -> httpx.Response:
    flow = api.post("/flows/", json={"name": "self-training"}).raise_for_status().json()
    body = {"name": f"in-{pool}", "flow_id": flow["id"], "work_pool_name": pool}
    body |= {"entrypoint": "flows.self_training.self_training", "job_variables": job_variables}
    return api.post("/deployments/", json=body | {"parameters": parameters})


@pytest.mark.parametrize("name", TEMPLATES)
def test_pool_holds_the_template_of_the_file_and_gives_a_valid_job(
    api: httpx.Client, name: str
) -> None:
    template = base_job_template(api, name)

    assert template == json.loads(TEMPLATES[name].read_text())
    job = job_of(template)
    for version in ("1.31", kubernetes_validate.latest_version()):
        kubernetes_validate.validate(job, version, strict=True)
    assert job["metadata"]["generateName"] == "nightly-20261126t020000z-"
    assert job["metadata"]["namespace"] == "selftrain"
    assert job["spec"]["backoffLimit"] == 0
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["args"] == ["prefect", "flow-run", "execute"]
    assert container["envFrom"] == [{"secretRef": {"name": "selftrain-store", "optional": True}}]
    assert pod["terminationGracePeriodSeconds"] == 120
    environment = {one["name"]: one["value"] for one in container["env"]}
    # SIGTERM stops the flow, which writes its checkpoint, and the run is scheduled anew.
    assert environment["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"] == "reschedule"


def test_job_of_the_gpu_pool_has_what_a_deployment_asks_for(api: httpx.Client) -> None:
    job = job_of(
        base_job_template(api, "gpu"),
        gpus=4,
        shm_size="32Gi",
        scratch_size="2Ti",
        node_selector={"cloud.example/accelerator": "h100"},
        tolerations=[{"key": "spot", "operator": "Exists"}],
        termination_grace_seconds=300,
        store_secret="other-store",
        env={"SELFTRAIN_STORE": "s3://bucket/selftrain"},
    )

    kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"] == {
        "requests": {"cpu": "8", "memory": "48Gi"},
        "limits": {"memory": "64Gi", "nvidia.com/gpu": 4},
    }
    assert pod["volumes"] == [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "32Gi"}},
        {"name": "scratch", "emptyDir": {"sizeLimit": "2Ti"}},
    ]
    assert {one["mountPath"] for one in container["volumeMounts"]} == {"/dev/shm", "/scratch"}
    assert pod["nodeSelector"] == {"cloud.example/accelerator": "h100"}
    assert pod["tolerations"] == [{"key": "spot", "operator": "Exists"}]
    assert pod["terminationGracePeriodSeconds"] == 300
    assert container["envFrom"][0]["secretRef"]["name"] == "other-store"
    assert {"name": "SELFTRAIN_STORE", "value": "s3://bucket/selftrain"} in container["env"]


def test_the_cpu_pool_asks_for_no_gpu(api: httpx.Client) -> None:
    pod = job_of(base_job_template(api, "cpu"))["spec"]["template"]["spec"]

    assert pod["containers"][0]["resources"]["limits"] == {"memory": "16Gi"}
    assert "nvidia" not in json.dumps(pod)


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"gpus": "four"}, "four"),
        ({"gpus": 0}, "minimum"),
        ({"gpu": 4}, "gpu"),
        ({"memory_limit": "64 GB"}, "64 GB"),
        ({"termination_grace_seconds": 30}, "minimum of 90"),
    ],
    ids=lambda value: str(value),
)
def test_a_deployment_with_a_variable_that_is_wrong_or_unknown_is_refused(
    api: httpx.Client, variables: dict[str, Any], named: str
) -> None:
    answer = deploy(api, "k8s-gpu", variables)

    assert answer.status_code == 422, answer.text
    assert named in answer.text


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_deployments_of_the_repository_fit_the_pools(api: httpx.Client, name: str) -> None:
    deployments = yaml.safe_load((INFRA / "prefect.yaml").read_text())["deployments"]

    for one in deployments:
        answer = deploy(api, f"k8s-{name}", one["work_pool"]["job_variables"])
        assert answer.status_code in (200, 201), answer.text


def test_a_template_with_a_variable_that_it_does_not_declare_is_refused(api: httpx.Client) -> None:
    template = json.loads(TEMPLATES["gpu"].read_text())
    del template["variables"]["properties"]["gpus"]

    body = {"name": "k8s-planted", "type": "kubernetes", "base_job_template": template}
    answer = api.post("/work_pools/", json=body)

    assert answer.status_code == 422, answer.text
    assert "gpus" in answer.text


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_pod_that_is_evicted_hands_its_run_on_and_the_next_pod_goes_on(
    api: httpx.Client, tmp_path: Path, tiny_config: Callable[..., SelfTrainingConfig]
) -> None:
    # What the pod's container runs, in the environment that the Job gives it.
    store = tmp_path / "store"
    short = ("rounds=1", "baseline=false", "student.duration.steps=12")
    long = ("teacher.duration.steps=1500", "teacher.checkpoint_every_steps=50")
    config = tiny_config(store, *short, *long, "launch.processes=1")
    deployed = deploy(
        api, "k8s-cpu", {}, config=config.model_dump(mode="json", by_alias=True)
    ).raise_for_status()
    start = {"state": {"type": "SCHEDULED"}, "tags": ["auto-scheduled"]}
    path = f"/deployments/{deployed.json()['id']}/create_flow_run"
    created = api.post(path, json=start).raise_for_status().json()
    job = job_of(base_job_template(api, "cpu"), flow_run=FlowRun.model_validate(created))
    (container,) = job["spec"]["template"]["spec"]["containers"]
    command = [sys.executable, "-m", *container["args"]]
    environment = os.environ | {one["name"]: one["value"] for one in container["env"]}
    # As in the image: Prefect copies the folder that a run starts in, here with its `.venv`.
    home = tmp_path / "home"
    home.mkdir()
    with (tmp_path / "log.txt").open("wb") as log:

        def start_pod() -> "subprocess.Popen[bytes]":
            return subprocess.Popen(
                command,
                cwd=home,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

        pod = start_pod()
        try:
            deadline = time.monotonic() + 200
            while not list(store.glob("models/*/attempts/*/*/checkpoint.json")):
                assert pod.poll() is None
                assert time.monotonic() < deadline, "no checkpoint"
                time.sleep(0.1)
            pod.send_signal(signal.SIGTERM)
            assert pod.wait(timeout=100) == 0
            state = api.get(f"/flow_runs/{created['id']}").raise_for_status().json()["state"]
            assert state["name"] == "AwaitingRetry"
            opened = open_store(str(store))
            (name,) = list_runs(opened)
            assert read_status(opened, name).state == "stopped"

            pod = start_pod()
            assert pod.wait(timeout=200) == 0
        finally:
            pod.kill()
    again = api.get(f"/flow_runs/{created['id']}").raise_for_status().json()
    assert (again["state"]["name"], again["run_count"]) == ("Completed", 2)
    assert list_runs(opened) == [name], "one run of the store, under the name of its schedule"
    teacher = read_status(opened, name).rounds[0].fingerprint
    assert teacher is not None
    provenance = read_provenance(opened, model_folder(teacher))
    assert provenance is not None
    assert provenance["resumed_at_step"] >= 50
