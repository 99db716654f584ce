"""Make the pictures of the README anew, from a real run of the demo: minutes on two cores.

    python docs/images/screenshots.py --store /srv/selftrain-store

The store's path is seen in one of them; a demo that is finished there is shown as it is. Chromium
and playwright (`pip install -e '.[dev]'`) are needed, nothing is loaded from elsewhere. Look at the
pictures before they are committed.
"""

import argparse
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from PIL import Image
from playwright.sync_api import Page, sync_playwright

FOLDER = Path(__file__).parent
PORT = 4329
URL = f"http://127.0.0.1:{PORT}"
MAX_BYTES = 150_000
_WAIT_MS = 60_000


def main() -> None:
    """Run the demo, then open each page and keep a picture of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_AsWritten)
    parser.add_argument("--store", type=Path, required=True, help="folder of the demo's store")
    store: Path = parser.parse_args().store
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        sys.exit("Chromium is not installed: no picture can be made")
    with TemporaryDirectory() as home, prefect_server(home) as environment:
        run = [sys.executable, "-m", "flows.cli", "run", "demo", "--store", str(store)]
        subprocess.run(run, env=environment, check=True)
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            page.set_default_timeout(_WAIT_MS)
            elsewhere = re.compile(r"^https?://(?!127\.0\.0\.1[:/])")
            page.route(elsewhere, lambda route: route.abort())
            picture_run(page)
            picture_results(page)
            picture_report(page, store)
            browser.close()


class _AsWritten(argparse.RawDescriptionHelpFormatter):
    """Help that keeps the lines of the docstring."""


@contextmanager
def prefect_server(home: str) -> Iterator[dict[str, str]]:
    """Yield the environment of a process that uses a server of its own, for the block's time."""
    os.environ["PREFECT_HOME"] = home
    os.environ.pop("PREFECT_API_URL", None)
    from flows import server  # reads the environment when it is imported

    with server.prefect_server(port=PORT) as ours:
        yield {**os.environ, "PREFECT_API_URL": ours.api_url}


def picture_run(page: Page) -> None:
    """Keep the page of the run: name, tags, state, and the graph of its stages."""
    filters = {"flows": {"name": {"any_": ["self-training"]}}, "sort": "START_TIME_DESC"}
    (run, *_) = httpx.post(f"{URL}/api/flow_runs/filter", json=filters).json()
    page.goto(f"{URL}/v2/runs/flow-run/{run['id']}")
    page.locator("canvas").wait_for()
    page.wait_for_timeout(5000)  # the graph moves into its place
    keep(page, "prefect-run.png", {"x": 256, "y": 0, "width": 1024, "height": 516})


def picture_results(page: Page) -> None:
    """Keep the artifact with the table of results."""
    artifacts = httpx.post(f"{URL}/api/artifacts/latest/filter", json={}).json()
    (latest,) = [one["latest_id"] for one in artifacts if one["key"] == "results-demo"]
    page.goto(f"{URL}/artifacts/artifact/{latest}")
    page.locator("table").wait_for()
    page.wait_for_timeout(1000)
    keep(page, "prefect-results.png", {"x": 256, "y": 0, "width": 1024, "height": 800})


def picture_report(page: Page, store: Path) -> None:
    """Keep the first screens of the report."""
    page.set_viewport_size({"width": 1120, "height": 1250})
    page.goto((store.absolute() / "runs" / "demo" / "report.html").as_uri())
    page.locator("svg").first.wait_for()
    keep(page, "report.png", None)


def keep(page: Page, name: str, clip: Any) -> None:
    """Write a picture in 256 colours, small enough to be kept in a repository."""
    picture = Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")
    path = FOLDER / name
    picture.quantize(256).save(path, optimize=True)
    size = path.stat().st_size
    print(f"{path}: {size} bytes")
    if size > MAX_BYTES:
        sys.exit(f"{path} has {size} bytes, the limit is {MAX_BYTES}: show less of the page")


if __name__ == "__main__":
    main()
