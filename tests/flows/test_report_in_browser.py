"""The report of a real run, opened in headless Chromium."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.config import SelfTrainingConfig
from flows.self_training import self_training

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.usefixtures("prefect_api", "trained_here"),
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]


def test_report_opens_with_its_tables_and_figures_and_no_error(
    tmp_path: Path, tiny_config: Callable[..., SelfTrainingConfig]
) -> None:
    store = tmp_path / "store"
    self_training(tiny_config(store, "rounds=1"))
    page = store / "runs" / "tiny" / "report.html"
    assert CHROMIUM is not None
    opened = subprocess.run(
        [
            CHROMIUM,
            *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--disable-background-networking", "--enable-logging=stderr", "--dump-dom"),
            f"--user-data-dir={tmp_path / 'profile'}",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "Baseline" in opened.stdout
    assert opened.stdout.count("<svg") >= 4
    assert opened.stdout.count('src="data:image/') >= 8
    # Violations of the page's own content security policy and the like.
    assert "CONSOLE" not in opened.stderr
