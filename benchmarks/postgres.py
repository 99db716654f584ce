"""A Postgres server of a benchmark's own, where its programs are installed."""

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from flows.server import free_port
from tasks.children import die_with_parent, stop_process_group

_DEBIAN = Path("/usr/lib/postgresql")  # its packages put no server on the path
_USER = "prefect"
_START_TIMEOUT_SECONDS = 60


def find_postgres() -> Path | None:
    """Return the folder with `initdb` and `postgres`, the newest if there are several, or None."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    versions = sorted(_DEBIAN.glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    return versions[-1].parent if versions else None


def postgres_version(binaries: Path) -> str:
    """Return what the server says of itself, as in `postgres (PostgreSQL) 15.13`."""
    done = subprocess.run(
        [binaries / "postgres", "--version"], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@contextmanager
def postgres_server(binaries: Path) -> Iterator[str]:
    """Yield the URL, for SQLAlchemy and asyncpg, of an empty database; it goes away afterwards.

    The server listens on loopback alone, with a password and Postgres's own settings. Root may not
    run it: then it runs as the user `postgres`, whom its packages make.
    """
    account = "postgres" if os.geteuid() == 0 else None
    password = secrets.token_hex(16)
    with TemporaryDirectory(prefix="selftrain-postgres-") as name:
        folder = Path(name)
        (folder / "password").write_text(password)
        if account is not None:
            for path in (folder, folder / "password"):
                shutil.chown(path, account, account)
        made = subprocess.run(
            [
                *(binaries / "initdb", "--pgdata", folder / "data", "--username", _USER),
                *("--pwfile", folder / "password", "--auth", "scram-sha-256"),
                *("--encoding", "UTF8", "--no-locale"),
            ],
            user=account,
            cwd=folder,
            capture_output=True,
            text=True,
        )
        if made.returncode:
            raise RuntimeError(f"{binaries / 'initdb'} made no database: {made.stderr.strip()}")
        port = free_port()
        log_path = folder / "server.log"
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [
                    *(binaries / "postgres", "-D", folder / "data", "-p", str(port)),
                    *("-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="),
                ],
                user=account,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        try:
            _wait_until_listening(port, process, log_path)
            yield f"postgresql+asyncpg://{_USER}:{password}@127.0.0.1:{port}/postgres"
        finally:
            stop_process_group(process, grace_seconds=20)


def _wait_until_listening(port: int, process: "subprocess.Popen[bytes]", log_path: Path) -> None:
    # It listens before it takes queries; Prefect's server, which comes next, takes longer to start.
    deadline = time.monotonic() + _START_TIMEOUT_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise RuntimeError(
        f"Postgres on port {port} did not start within {_START_TIMEOUT_SECONDS} s (exit code"
        f" {process.poll()}); its log ends:\n{log_path.read_text(errors='replace')[-2000:]}"
    )
