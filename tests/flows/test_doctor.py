"""`selftrain doctor`: each check finds what it is there for, and says what to do."""

import base64
import importlib.metadata
import json
import resource
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import prefect
import pytest
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from typer.testing import CliRunner, Result

from flows import machine_checks, prefect_checks, store_checks
from flows.checks import Check, checked
from flows.cli import app
from flows.config import SelfTrainingConfig
from flows.deploying import Pools, deploy
from flows.machine import Machine
from flows.server import prefect_server
from storage.store import Store

MakeConfig = Callable[..., SelfTrainingConfig]


def test_a_check_that_raises_is_one_that_failed_and_ends_no_other() -> None:
    def check() -> Iterator[Check]:
        yield Check("first", "ok", "there")
        raise OSError("no route\nmore")

    assert checked("second", check, remedy="Plug it in") == [
        Check("first", "ok", "there"),
        Check("second", "fail", "no route", "Plug it in"),
    ]


def test_a_store_that_can_be_used_is_ok_and_left_as_it_was(tmp_path: Path) -> None:
    found = list(store_checks.check_store(str(tmp_path / "store")))

    assert [(check.name, check.level) for check in found] == [
        ("store", "ok"),
        ("conditional writes", "ok"),
        ("store's clock", "ok"),
    ]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [check.level for check in store_checks.check_store(None)] == ["warn"]


def test_a_store_that_does_not_list_or_delete_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Store, "list", lambda self, folder="": [])
        found = list(store_checks.check_store(str(tmp_path)))
        assert [(check.level, "does not list" in check.found) for check in found] == [
            ("fail", True)
        ]
    monkeypatch.setattr(Store, "delete", lambda self, path: None)
    found = list(store_checks.check_store(str(tmp_path)))
    assert [check.level for check in found] == ["fail"]
    assert "keeps what" in found[0].found


@pytest.mark.parametrize(
    ("store", "skew", "level"),
    [
        ("folder", 59.0, "ok"),
        ("folder", -61.0, "warn"),
        ("folder", 1000.0, "warn"),
        ("memory", 899.0, "warn"),
        ("memory", -901.0, "fail"),
    ],
)
def test_clocks_may_differ_by_a_minute_and_on_s3_never_by_fifteen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str, skew: float, level: str
) -> None:
    monkeypatch.setattr(store_checks, "time_of", lambda _: 5000.0 + skew)
    monkeypatch.setattr(store_checks.time, "time", lambda: 5000.0)
    url = str(tmp_path) if store == "folder" else "memory://clock/store"

    clock = list(store_checks.check_store(url))[-1]

    assert (clock.name, clock.level) == ("store's clock", level)
    assert f"{skew:+.1f} s" in clock.found


def test_a_store_without_conditional_writes_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_checks, "conditional_create_works", lambda _: False)
    found = {check.name: check for check in store_checks.check_store(str(tmp_path))}
    assert found["conditional writes"].level == "warn"


def test_credentials_are_named_by_where_they_come_from_and_never_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": "hunter2-secret",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
    }.items():
        monkeypatch.setenv(name, value)

    (given,) = store_checks.check_credentials(None, "s3://bucket/prefix")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    (missing,) = store_checks.check_credentials(None, "s3://bucket/prefix")

    assert given.found == "from env, for s3:// at http://127.0.0.1:9"
    assert (given.level, missing.level) == ("ok", "fail")
    assert "AWS_PROFILE" in missing.remedy
    assert list(store_checks.check_credentials(None, "/folder")) == []


def test_data_is_looked_for_split_by_split(
    tmp_path: Path, tiny_config: MakeConfig, corpora_folder: Path
) -> None:
    photos = tmp_path / "photos" / "cat"
    photos.mkdir(parents=True)
    (photos / "1.jpg").write_bytes(b"x")
    config = tiny_config(
        tmp_path, "data.test=nowhere-{0..1}.tar", f"data.unlabeled={tmp_path / 'photos'}"
    )

    found = {check.name: check for check in store_checks.check_data(config)}

    assert found["data.labeled"].level == "ok"
    assert "3 shards" in found["data.labeled"].found
    assert found["data.test"].level == "fail"
    assert "nowhere-" in found["data.test"].found
    assert found["data.unlabeled"].remedy == f"selftrain init {tmp_path / 'photos'}"
    index = tiny_config(tmp_path, "data.dev=index.json", "data.exclude=gone.txt")
    found = {check.name: check for check in store_checks.check_data(index)}
    assert "no index at" in found["data.dev"].found
    assert found["data.exclude"].level == "fail"


def test_versions_out_of_bounds_and_missing_extras_are_named(
    monkeypatch: pytest.MonkeyPatch, tiny_config: MakeConfig
) -> None:
    installed = {"selftrain": "0.1.0", "torch": "2.15.0", "ray": "2.60", "distributed": "2026.8"}
    needed = [
        "torch>=2.11",
        "distributed>=2026.8; extra == 'dask'",
        "ray>=2.60; extra == 'ray'",
        "pytest>=9; extra == 'dev'",
    ]

    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: needed)
    local, dask = tiny_config("store"), tiny_config("store", "engine={kind: dask}")

    assert [c.level for c in machine_checks.check_versions(local)] == ["ok"]
    assert [c.level for c in machine_checks.check_versions(dask)] == ["ok", "ok"]
    del installed["distributed"]
    installed["torch"] = "2.10.0"
    ours, engine = machine_checks.check_versions(dask)
    assert (ours.level, ours.found) == ("fail", "torch 2.10.0 is not >=2.11")
    assert (engine.name, engine.found) == ("engine dask", "distributed is missing")
    assert "selftrain[dask]" in engine.remedy
    del needed[1]
    assert [c.level for c in machine_checks.check_versions(dask)] == ["fail", "warn"]


def test_devices_and_precision_are_judged_by_the_config(
    monkeypatch: pytest.MonkeyPatch, tiny_config: MakeConfig
) -> None:
    monkeypatch.setattr(machine_checks, "this_machine", _machine)
    monkeypatch.setattr(machine_checks, "emulates_bf16", lambda _: True)

    cuda = list(machine_checks.check_devices(tiny_config("store", "device=cuda")))
    slow = list(machine_checks.check_devices(tiny_config("store", "labeling.precision=bf16")))
    plain = list(machine_checks.check_devices(tiny_config("store")))

    assert [check.level for check in cuda] == ["fail"]
    assert [check.level for check in slow] == ["ok", "warn"]
    assert [check.level for check in plain] == ["ok"]


def test_disks_and_limits(
    monkeypatch: pytest.MonkeyPatch, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    cache = f"cache={{dir: '{tmp_path}', max_bytes: 100}}"
    too_large = f"cache={{dir: '{tmp_path}', max_bytes: {10**18}}}"
    levels = {
        check.name: check.level
        for check in machine_checks.check_disks(tiny_config("store", cache), str(tmp_path))
    }
    assert levels["cache"] == "ok"
    assert {"temporary files", "PREFECT_HOME", "store's disk"} <= levels.keys()
    found = {
        check.name: check
        for check in machine_checks.check_disks(tiny_config("store", too_large), None)
    }
    assert found["cache"].level == "fail"
    assert "store's disk" not in found

    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))
    assert next(machine_checks.check_limits()).level == "warn"
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    assert next(machine_checks.check_limits()).level == "ok"


def test_our_own_test_server_is_found_right(prefect_api: str) -> None:
    found = {check.name: check for check in prefect_checks.check_prefect()}

    assert found["Prefect server"].level == "ok"
    assert prefect.__version__ in found["Prefect server"].found
    assert found["Prefect authentication"].found == "on loopback, without"
    assert found["Prefect analytics"] == Check("Prefect analytics", "ok", "off")
    assert found["Prefect leases"] == Check("Prefect leases", "ok", "filesystem")


def test_a_server_that_is_older_open_or_sends_analytics_is_told_of(
    fake_server: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefect_checks, "_is_loopback", lambda _: False)
    older = _prefect(fake_server(version="3.0.1", analytics=True))
    newer = _prefect(fake_server(version="99.0.0"))

    assert {name: check.level for name, check in older.items()} == {
        "Prefect server": "fail",
        "Prefect authentication": "warn",
        "Prefect analytics": "warn",
        "Prefect leases": "warn",
    }
    assert "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE" in older["Prefect leases"].remedy
    assert newer["Prefect server"].level == "warn"
    assert newer["Prefect analytics"].level == "ok"


def test_a_server_that_asks_for_a_password_gets_ours(fake_server: Callable[..., str]) -> None:
    url = fake_server(version=prefect.__version__, password="admin:pass")

    without = _prefect(url)
    with_password = _prefect(url, password="admin:pass")

    assert without["Prefect server"].level == "fail"
    assert "PREFECT_API_AUTH_STRING" in without["Prefect server"].remedy
    assert with_password["Prefect server"].level == "ok"
    assert with_password["Prefect authentication"].found == "the server asks for it"
    open_server = fake_server(version=prefect.__version__)
    needless = _prefect(open_server, password="admin:pass")
    assert needless["Prefect authentication"].level == "warn"


def test_no_server_and_none_that_answers() -> None:
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        (found,) = prefect_checks.check_prefect()
    assert (found.level, "starts its own" in found.found) == ("ok", True)
    assert _prefect("http://127.0.0.1:9/api")["Prefect server"].level == "fail"
    assert prefect_checks._is_loopback("127.0.0.1")
    assert prefect_checks._is_loopback("localhost")
    assert not prefect_checks._is_loopback("prefect.example.org")


def test_commands_refuse_a_server_that_does_not_let_them_in_as_the_doctor_does(
    fake_server: Callable[..., str], tiny_config: MakeConfig, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path / "store")
    closed = fake_server(version=prefect.__version__, password="admin:pass")
    for url, said in (
        ("http://127.0.0.1:9/api", "127.0.0.1:9/api does not answer: ConnectError. Start it"),
        (closed, "asks for authentication (status 401). Set PREFECT_API_AUTH_STRING"),
    ):
        with temporary_settings({PREFECT_API_URL: url}):
            with pytest.raises(prefect_checks.ServerOutOfReach) as refused, prefect_server():
                raise AssertionError("a server that is out of reach was given")
            assert said in str(refused.value)
            with pytest.raises(prefect_checks.ServerOutOfReach):
                deploy(config, Pools("cpu", "cpu"))
            result = CliRunner().invoke(app, ["run", "demo", "--store", str(tmp_path / "other")])
            assert result.exit_code == 1
            assert said in result.stderr
            assert "SELFTRAIN_DEBUG" not in result.stderr, "it names its remedy"
    assert not (tmp_path / "other" / "runs").exists()


def test_the_command_prints_lines_or_json_and_fails_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect_api: str
) -> None:
    store = f"--store={tmp_path / 'store'}"

    answer = json.loads(_invoke("doctor", "demo", store, "--json").stdout)

    assert answer.keys() == {"schema", "ok", "checks"}
    assert (answer["schema"], answer["ok"]) == (1, True)
    for check in answer["checks"]:
        assert check.keys() == {"name", "level", "found", "remedy"}
        assert check["level"] in ("ok", "warn", "fail")
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    failed = _invoke("doctor", f"--store={blocked}", expect=1)
    assert "fail" in failed.stdout
    assert "-> " in failed.stdout
    monkeypatch.delenv("SELFTRAIN_STORE", raising=False)
    assert "none is named" in _invoke("doctor").stdout


@pytest.fixture
def fake_server() -> Iterator[Callable[..., str]]:
    """Return a starter of servers that answer as Prefect's API does to what doctor asks."""
    servers: list[ThreadingHTTPServer] = []

    def start(*, version: str, analytics: bool = False, password: str | None = None) -> str:
        answers: dict[str, Any] = {
            "/api/admin/version": version,
            "/api/admin/settings": {
                "server": {
                    "analytics_enabled": analytics,
                    "concurrency": {
                        "lease_storage": "prefect.server.concurrency.lease_storage.memory"
                    },
                }
            },
        }
        wanted = None
        if password is not None:
            wanted = f"Basic {base64.b64encode(password.encode()).decode()}"

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                refused = wanted is not None and self.headers.get("Authorization") != wanted
                body = json.dumps(answers.get(self.path)).encode()
                self.send_response(401 if refused else 200 if self.path in answers else 404)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                """Keep stderr for what fails."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}/api"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def _prefect(url: str, password: str | None = None) -> dict[str, Check]:
    settings: dict[Any, Any] = {PREFECT_API_URL: url}
    if password is not None:
        settings[PREFECT_API_AUTH_STRING] = password
    with temporary_settings(settings):
        return {check.name: check for check in prefect_checks.check_prefect()}


def _machine() -> Machine:
    return Machine(gpus=0, cores=2, has_bf16=False)


def _invoke(*arguments: str, expect: int = 0) -> Result:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == expect, (result.output, result.exception)
    return result
