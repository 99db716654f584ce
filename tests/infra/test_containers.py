"""infra/Dockerfile and infra/compose.yaml: linted, of one piece, and with settings that exist."""

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.settings import Settings
from prefect_kubernetes.settings import KubernetesSettings
from pydantic import BaseModel

from flows.server import _SERVER_SETTINGS  # pyright: ignore[reportPrivateUsage]

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
DOCKERFILE = INFRA / "Dockerfile"
COMPOSE_FILE = INFRA / "compose.yaml"
COMPOSE: dict[str, Any] = yaml.safe_load(COMPOSE_FILE.read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def run_tool(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a program of this environment's; it reads files and needs no network."""
    program = Path(sysconfig.get_path("scripts")) / command[0]
    return subprocess.run(
        [program, *command[1:]],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def check_compose(path: Path) -> subprocess.CompletedProcess[str]:
    return run_tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(path))


def test_dockerfile_passes_the_linter() -> None:
    done = run_tool("hadolint", str(DOCKERFILE))

    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("-slim-bookworm AS base", " AS base\nRUN sudo true", "DL3004"),
        ("USER 10001:10001", "USER root", "DL3002"),
        ("WORKDIR /home/selftrain", "WORKDIR home", "DL3000"),
        ('ENTRYPOINT ["tini", "--"]', "ENTRYPOINT tini --", "DL3025"),
        ("COPY flows flows", "COPPY flows flows", "unexpected"),
    ],
)
def test_linter_finds_a_planted_mistake(tmp_path: Path, old: str, new: str, rule: str) -> None:
    text = DOCKERFILE.read_text()
    assert old in text
    planted = tmp_path / "Dockerfile"
    planted.write_text(text.replace(old, new))

    done = run_tool("hadolint", str(planted))

    assert done.returncode != 0
    assert rule in done.stdout + done.stderr


def test_image_holds_all_packages_and_what_their_build_reads() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    needed = {*packages, "pyproject.toml", "constraints.txt"}
    needed |= {project["project"]["readme"], *project["project"]["license-files"]}

    copied = {
        name
        for line in DOCKERFILE.read_text().splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for name in line.split()[1:-1]
    }
    ignored = (ROOT / ".dockerignore").read_text().splitlines()

    assert copied == needed
    assert "*" in ignored
    assert {line[1:] for line in ignored if line.startswith("!")} == needed
    (extras,) = re.findall(r'ARG EXTRAS="(.+)"', DOCKERFILE.read_text())
    assert set(extras.split(",")) == project["project"]["optional-dependencies"].keys() - {
        "dev",
        "docs",
    }


def test_user_of_the_image_is_the_one_that_the_manifests_name() -> None:
    (user,) = re.findall(r"useradd --uid (\d+)", DOCKERFILE.read_text())
    named = {
        number
        for path in (INFRA / "kubernetes").iterdir()
        for number in re.findall(r'runAsUser"?: (\d+)', path.read_text())
    }

    assert f"USER {user}:{user}" in DOCKERFILE.read_text()
    assert named == {user}


def test_compose_file_is_accepted_by_the_schema_of_compose() -> None:
    done = check_compose(COMPOSE_FILE)

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("healthcheck:", "healthchecks:"),
        ("condition: service_healthy", "condition: healthy"),
        ("shm_size: 8gb", "shm_size: [8gb]"),
    ],
)
def test_schema_of_compose_finds_a_planted_mistake(tmp_path: Path, old: str, new: str) -> None:
    text = COMPOSE_FILE.read_text()
    assert old in text
    planted = tmp_path / "compose.yaml"
    planted.write_text(text.replace(old, new))

    assert check_compose(planted).returncode == 1


def test_services_of_compose_wait_for_services_that_are_healthy() -> None:
    for name, service in SERVICES.items():
        for other, wait in service.get("depends_on", {}).items():
            if wait["condition"] == "service_healthy":
                assert "healthcheck" in SERVICES[other], f"{name} waits for {other}"
            else:
                assert wait["condition"] == "service_completed_successfully"
                assert SERVICES[other]["restart"] == "no"
        for volume in service.get("volumes", []):
            assert volume.split(":")[0] in COMPOSE["volumes"]
        if service["image"].startswith("selftrain"):
            assert re.fullmatch(rf"selftrain:{re.escape(VERSION)}-(cpu|cuda)", service["image"])
        else:
            assert re.search(r":[a-z0-9.-]*\d", service["image"]), "a version, not latest"


def test_compose_publishes_nothing_beyond_this_machine_and_writes_no_secret() -> None:
    published = [port for one in SERVICES.values() for port in one.get("ports", [])]

    assert len(published) == 2
    assert all(port.startswith("127.0.0.1:") for port in published)
    secrets = [
        (name, value)
        for service in SERVICES.values()
        for name, value in service["environment"].items()
        if re.search(r"PASSWORD|AUTH_STRING|ACCESS_KEY|SECRET_KEY", name)
    ]
    assert len(secrets) == 14
    for name, value in secrets:
        # Without a default: compose asks for what is missing.
        assert re.fullmatch(r"\$\{[A-Z_]+:\?write it into infra/\.env\}", value), name


def test_server_of_compose_has_authentication_and_the_settings_of_our_own_server() -> None:
    settings = SERVICES["prefect-server"]["environment"]
    worker = SERVICES["worker"]["environment"]

    assert settings["PREFECT_SERVER_API_AUTH_STRING"] == worker["PREFECT_API_AUTH_STRING"]
    assert settings["PREFECT_SERVER_CSRF_PROTECTION_ENABLED"] == "true"
    for name, value in _SERVER_SETTINGS.items():
        if "BATCH_SIZE" in name or "LEASE" in name:
            assert settings[name] == value


def set_variables() -> Iterator[tuple[str, str]]:
    """Names that infra/ sets, with the file."""
    for service in SERVICES.values():
        yield from ((name, "compose.yaml") for name in service["environment"])
    for name in re.findall(r"^(?:ENV|   ) ?([A-Z_]+)=", DOCKERFILE.read_text(), re.MULTILINE):
        yield name, "Dockerfile"
    for path in (INFRA / "kubernetes").glob("*.yaml"):
        for name in re.findall(r"- name: ([A-Z_]+)$", path.read_text(), re.MULTILINE):
            yield name, path.name
    deployments = (INFRA / "prefect.yaml").read_text()
    for name in re.findall(r"^ +(PREFECT_[A-Z_]+):", deployments, re.MULTILINE):
        yield name, "prefect.yaml"


def settings_of(model: type[BaseModel], prefix: str = "PREFECT_") -> set[str]:
    """The environment variables of a section of Prefect's settings and of the sections in it."""
    found: set[str] = set()
    for name, field in model.model_fields.items():
        variable = f"{prefix}{name.upper()}"
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= settings_of(kind, f"{variable}_")
        else:
            found.add(variable)
            choices = getattr(field.validation_alias, "choices", ())
            found |= {choice.upper() for choice in choices if isinstance(choice, str)}
    return found


def test_every_setting_of_prefect_exists() -> None:
    # Prefect ignores a name that it does not know.
    known = settings_of(Settings)
    known |= settings_of(KubernetesSettings, "PREFECT_INTEGRATIONS_KUBERNETES_")

    found = [(name, file) for name, file in set_variables() if name.startswith("PREFECT_")]

    assert {file for _, file in found} >= {"compose.yaml", "Dockerfile", "prefect-worker.yaml"}
    assert not [(name, file) for name, file in found if name not in known]


@pytest.mark.s3
def test_the_bucket_is_made_once_and_then_there() -> None:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {name: text for name, text in os.environ.items() if not name.startswith("AWS_")}
    environment |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test-secret",
        "AWS_DEFAULT_REGION": SERVICES["bucket"]["environment"]["AWS_DEFAULT_REGION"],
    }
    program, *arguments = SERVICES["bucket"]["command"]
    bucket = SERVICES["worker"]["environment"]["SELFTRAIN_STORE"].removeprefix("s3://")
    look = f"import s3fs; print(s3fs.S3FileSystem().exists({bucket.partition('/')[0]!r}))"
    said: list[str] = []
    try:
        for command in (["-c", look], arguments, arguments, ["-c", look]):
            done = subprocess.run(
                [sys.executable, *command],
                env=environment,
                capture_output=True,
                text=True,
                timeout=120,
                check=True,
            )
            said.append(done.stdout.strip())
    finally:
        server.stop()
    assert program == "python"
    assert said == ["False", "", "", "True"]
