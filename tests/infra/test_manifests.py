"""infra/kubernetes: manifests that Kubernetes' own schemas accept, and commands that exist.

The schemas ship with the package kubernetes-validate. Those of JobSet and RayCluster do not: of
these the pods inside are checked by Kubernetes' schemas, the rest against a list of keys by hand.
"""

import copy
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import prefect_kubernetes.observer
import prefect_kubernetes.worker
import pytest
import yaml
from distributed.cli import dask_scheduler, dask_worker
from prefect.cli.worker import worker_app
from torch.distributed.run import get_args_parser

from tasks.worker import _parser as worker_parser  # pyright: ignore[reportPrivateUsage]

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "infra" / "kubernetes"
MANIFESTS = sorted(FOLDER.glob("*.yaml"))
# The oldest that all is made for (podFailurePolicy), and the newest whose schemas are at hand.
KUBERNETES_VERSIONS = ("1.31", kubernetes_validate.latest_version())
SECRET = re.compile(r"PASSWORD|TOKEN|AUTH_STRING$|ACCESS_KEY|API_KEY$")

CUSTOM = {
    "JobSet": {
        "spec": {"network", "failurePolicy", "ttlSecondsAfterFinished", "replicatedJobs"},
        "spec.network": {"enableDNSHostnames", "subdomain", "publishNotReadyAddresses"},
        "spec.failurePolicy": {"maxRestarts"},
        "spec.replicatedJobs": {"name", "replicas", "template"},
    },
    "RayCluster": {
        "spec": {"rayVersion", "headGroupSpec", "workerGroupSpecs"},
        "spec.headGroupSpec": {"rayStartParams", "template"},
        "spec.workerGroupSpecs": {
            *("groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template")
        },
    },
}
"""By kind, the keys that may stand at each place outside of pods and Jobs."""


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def every_document() -> list[dict[str, Any]]:
    return [document for path in MANIFESTS for document in documents(path)]


def native_parts(document: dict[str, Any]) -> list[dict[str, Any]]:
    """What of a document is Kubernetes' own: itself, or the Jobs and pods of a custom kind."""
    spec = document.get("spec", {})
    if document["kind"] == "JobSet":
        return [
            {"apiVersion": "batch/v1", "kind": "Job", **one["template"]}
            for one in spec["replicatedJobs"]
        ]
    if document["kind"] == "RayCluster":
        groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
        return [
            {"apiVersion": "v1", "kind": "PodTemplate", "template": one["template"]}
            for one in groups
        ]
    return [document]


def pods(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for part in native_parts(document):
        template = part.get("template") or part.get("spec", {}).get("template")
        if template is not None:
            yield template["spec"]


def the(path: str, kind: str) -> dict[str, Any]:
    (found,) = [one for one in documents(FOLDER / path) if one["kind"] == kind]
    return found


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_are_accepted_by_the_schemas_of_kubernetes(path: Path, version: str) -> None:
    checked = [part for document in documents(path) for part in native_parts(document)]

    assert checked
    for part in checked:
        kubernetes_validate.validate(part, version, strict=True)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_misspelled_field_of_a_pod_is_found(path: Path) -> None:
    for document in documents(path):
        for part in native_parts(document):
            for spec in pods(part):
                spec["nodeSelectors"] = {}
                with pytest.raises(kubernetes_validate.ValidationError, match="nodeSelectors"):
                    kubernetes_validate.validate(part, KUBERNETES_VERSIONS[0], strict=True)


def test_custom_kinds_have_only_known_keys() -> None:
    seen: set[str] = set()
    for document in every_document():
        for place, known in CUSTOM.get(document["kind"], {}).items():
            found: Any = document
            for key in place.split("."):
                found = found[key]
            for one in found if isinstance(found, list) else [found]:
                assert one.keys() <= known, f"{document['kind']} {place}"
            seen.add(document["kind"])
    assert seen == CUSTOM.keys()


def test_secrets_are_named_and_never_written() -> None:
    containers = [one for doc in every_document() for pod in pods(doc) for one in pod["containers"]]
    for name in ("gpu", "cpu"):
        template = json.loads((FOLDER / f"{name}-base-job-template.json").read_text())
        manifest = template["job_configuration"]["job_manifest"]
        containers += manifest["spec"]["template"]["spec"]["containers"]

    assert len(containers) > 8
    assert "Secret" not in {document["kind"] for document in every_document()}
    for container in containers:
        for variable in container["env"] if isinstance(container.get("env"), list) else []:
            is_secret = re.search(
                r"PASSWORD|TOKEN|AUTH_STRING$|ACCESS_KEY|API_KEY$", variable["name"]
            )
            assert bool(is_secret) == ("valueFrom" in variable), variable
        for source in container.get("envFrom", []):
            assert source.keys() == {"secretRef"}


def test_pods_with_gpus_find_their_nodes_have_shared_memory_and_time_for_a_checkpoint() -> None:
    with_gpus = [
        pod
        for document in every_document()
        for pod in pods(document)
        if "nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"]
    ]

    assert len(with_gpus) == 4
    for pod in with_gpus:
        (container,) = pod["containers"]
        assert container["image"].endswith("-cuda")
        assert pod["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
        assert pod["tolerations"] == [
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        ]
        assert pod["terminationGracePeriodSeconds"] >= 90
        mounts = {one["mountPath"]: one["name"] for one in container["volumeMounts"]}
        volumes = {one["name"]: one for one in pod["volumes"]}
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"


def test_every_pod_is_of_this_versions_image_and_without_privileges() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    found = [pod for document in every_document() for pod in pods(document)]

    assert len(found) == 7
    for pod in found:
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert container["image"] in {f"selftrain:{version}-cpu", f"selftrain:{version}-cuda"}
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }


@pytest.mark.parametrize("path", ["training-job.yaml", "training-jobset.yaml"])
def test_the_training_starts_a_worker_for_each_gpu_of_its_nodes(path: str) -> None:
    (job,) = [
        part
        for one in documents(FOLDER / path)
        for part in native_parts(one)
        if part["kind"] == "Job"
    ]
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    program, *arguments = container["args"]

    assert program == "torchrun"
    options = get_args_parser().parse_args(arguments)
    assert (options.module, options.training_script) == (True, "tasks.worker")
    worker = worker_parser().parse_args(options.training_script_args)
    assert (worker.store, worker.fingerprint) == ("$(STORE)", "$(FINGERPRINT)")
    assert {"STORE", "FINGERPRINT"} <= {one["name"] for one in container["env"]}
    assert options.rdzv_backend == "c10d"
    assert int(options.nnodes) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert int(options.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert job["spec"]["completionMode"] == "Indexed"


def test_the_ranks_meet_at_the_first_pod_under_the_name_that_dns_gives_it() -> None:
    job, service = the("training-job.yaml", "Job"), the("training-job.yaml", "Service")
    jobset = the("training-jobset.yaml", "JobSet")

    pod = job["spec"]["template"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert pod["spec"]["subdomain"] == service["metadata"]["name"]
    # An Indexed Job's pod 0 has the host name JOB-0, a JobSet's JOBSET-REPLICATED_JOB-0-0.
    first = f"{job['metadata']['name']}-0.{service['metadata']['name']}:29400"
    assert f"--rdzv-endpoint={first}" in pod["spec"]["containers"][0]["args"]
    (replicated,) = jobset["spec"]["replicatedJobs"]
    network = jobset["spec"]["network"]
    first = f"{jobset['metadata']['name']}-{replicated['name']}-0-0.{network['subdomain']}:29400"
    (jobset_pod,) = pods(jobset)
    assert f"--rdzv-endpoint={first}" in jobset_pod["containers"][0]["args"]


def test_job_and_jobset_run_the_same_pod() -> None:
    (of_job,) = pods(the("training-job.yaml", "Job"))
    (of_jobset,) = pods(the("training-jobset.yaml", "JobSet"))
    of_job, of_jobset = copy.deepcopy(of_job), copy.deepcopy(of_jobset)
    # The JobSet makes the Service, whose name is then not the pod's to give; each pod takes all
    # GPUs of its node, so that the Job's rule keeps apart nothing more.
    for key in ("subdomain", "affinity"):
        del of_job[key]
    for pod in (of_job, of_jobset):
        arguments = pod["containers"][0]["args"]
        arguments[:] = [one for one in arguments if not one.startswith("--rdzv-endpoint")]

    assert of_job == of_jobset


def test_prefects_workers_poll_the_pools_and_may_do_what_they_must() -> None:
    (pod,) = pods(the("prefect-worker.yaml", "Deployment"))
    pools: list[str] = []
    for container in pod["containers"]:
        program, group, command, *options = container["args"]
        assert (program, group, command) == ("prefect", "worker", "start")
        _, bound, *_ = worker_app.parse_args(["start", *options], exit_on_error=False)
        assert bound.kwargs["worker_type"] == "kubernetes"
        pools.append(bound.kwargs["work_pool_name"])
        variables = {one["name"]: one.get("value") for one in container["env"]}
        port = container["livenessProbe"]["httpGet"]["port"]
        assert variables["PREFECT_WORKER_WEBSERVER_PORT"] == str(port)
    deployments = yaml.safe_load((ROOT / "infra" / "prefect.yaml").read_text())["deployments"]
    assert {one["work_pool"]["name"] for one in deployments} <= set(pools)

    rules = the("prefect-worker.yaml", "Role")["rules"]
    allowed = {
        f"{verb} {resource}"
        for rule in rules
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    # What Prefect's worker and observer call, read off their source, but for secrets: those they
    # write where it is asked of them, and it is not.
    source = "".join(
        Path(str(module.__file__)).read_text()
        for module in (prefect_kubernetes.worker, prefect_kubernetes.observer)
    )
    called = {
        f"{verb.replace('read', 'get')} {resource.replace('pod_log', 'pods/log')}"
        for verb, resource in re.findall(r"\.([a-z]+)_namespaced_([a-z_]+)\(", source)
        if resource != "secret"
    }
    assert {"create job", "delete job", "list pod", "get pods/log"} <= called
    plural = {one if one.endswith("pods/log") else f"{one}s" for one in called}
    assert plural | {"watch jobs", "watch pods"} <= allowed


def test_the_ray_cluster_has_the_version_of_the_image() -> None:
    # Ray refuses a client of another version.
    (pinned,) = re.findall(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert the("ray-cluster.yaml", "RayCluster")["spec"]["rayVersion"] == pinned


def test_dask_is_started_with_options_that_it_has() -> None:
    commands = [
        pod["containers"][0]["args"]
        for document in documents(FOLDER / "dask-cluster.yaml")
        for pod in pods(document)
    ]

    assert [one[:2] for one in commands] == [["dask", "scheduler"], ["dask", "worker"]]
    scheduler = dask_scheduler.main.make_context("scheduler", commands[0][2:]).params
    worker = dask_worker.main.make_context("worker", commands[1][2:]).params
    service = the("dask-cluster.yaml", "Service")
    assert int(scheduler["port"]) == service["spec"]["ports"][0]["port"]
    assert worker["scheduler"] == "tcp://dask-scheduler.selftrain.svc:8786"
    assert (worker["nthreads"], worker["resources"]) == (1, "GPU=1")
