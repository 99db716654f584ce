"""The notebook: a whole notebook as its format has it, clean of outputs, and its cells run."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
NOTEBOOK = REPOSITORY / "docs" / "notebooks" / "digits.ipynb"

# What a front end does: each cell in turn, in one namespace, inside a running event loop.
_RUNNER = """
import asyncio, json, sys

async def run(path):
    namespace = {"__name__": "__main__"}
    for cell in json.load(open(path))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), namespace)
    print(json.dumps(namespace["status"]))

asyncio.run(run(sys.argv[1]))
"""


def _cells() -> list[dict[str, Any]]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_the_notebook_is_of_format_4_5_and_holds_no_outputs() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))

    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("markdown", "code")
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
            compile("".join(cell["source"]), cell["id"], "exec")


def test_what_the_notebook_links_to_is_there() -> None:
    text = "\n".join("".join(cell["source"]) for cell in _cells())
    links = re.findall(r"\]\(([^)#]+)", text)
    assert links
    for link in links:
        assert (NOTEBOOK.parent / link).is_file(), link


@pytest.mark.slow
def test_the_cells_of_the_notebook_run(tmp_path: Path, prefect_api: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _RUNNER, str(NOTEBOOK)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-3000:]
    status = json.loads(done.stdout.splitlines()[-1])
    assert (status["run"], status["state"]) == ("notebook", "done")
    assert "images kept" in done.stdout
    assert "truth" in done.stdout
    assert (tmp_path / "selftrain-notebook-store" / "runs" / "notebook" / "report.html").is_file()
    assert (tmp_path / "selftrain-notebook-model" / "model.safetensors").is_file()
