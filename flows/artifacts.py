"""What the Prefect UI shows of a run beside its states: artifacts and tags.

They are views. One that cannot be written is logged, and the run goes on.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import get_run_logger, tags
from prefect.artifacts import create_image_artifact, create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run

from flows.latest_teachers import series_of
from flows.run_status import RunStatus, status_table
from storage.store import Store
from tasks import report_facts as facts
from tasks import report_selection_figures as figures
from tasks.report_svg import draw_png

_ROUND_TAG = re.compile(r"round-\d+|baseline")


def artifact_key(*parts: str) -> str:
    """Return a key of the parts: lower case, digits and dashes are all that Prefect allows."""
    return re.sub(r"[^a-z0-9]", "-", "-".join(parts).lower())


def show_results(store: Store, status: RunStatus) -> None:
    """Show a table of the rounds so far, with links to report and model, and two figures."""
    with _only_logged(f"results of run {status.run}"):
        create_markdown_artifact(
            f"{status_table(status)}\n\nState: {status.in_words()}\n\n"
            f"Report: {_link(status.report_url)}\n\nModel: {_link(status.model_url)}",
            key=artifact_key("results", status.run),
            description=f"Results of run {status.run}",
        )
    show_figures(store, status)


def show_figures(store: Store, status: RunStatus) -> None:
    """Show confidences and class balance of the selections as images; nothing before any."""
    drawings: dict[str, tuple[str, Callable[..., str | None]]] = {
        "confidence": ("Kept and rejected predictions by confidence", figures.confidence_figure),
        "classes": ("Samples per class before and after selection", figures.class_balance_figure),
    }
    with _only_logged(f"figures of run {status.run}"):
        chosen = facts.selections(store, status.to_json())
        for name, (title, draw) in drawings.items():
            image = draw(chosen, draw_png)
            if image is not None:
                create_image_artifact(
                    image,
                    key=artifact_key(name, status.run),
                    description=f"{title}, run {status.run}",
                )


@contextmanager
def tagged(run: str, part: str) -> Iterator[None]:
    """Tag the flow run, and what is begun in the block, with the run's name and a part of it.

    Args:
        run: name of the run; of a scheduled one also that of its config.
        part: `round-3` or `baseline`.
    """
    ours = {run, series_of(run), part}
    with _only_logged(f"tags of run {run}"):
        if flow_run.id is not None:
            with get_client(sync_client=True) as client:
                there = client.read_flow_run(UUID(flow_run.id)).tags
                others = {tag for tag in there if not _ROUND_TAG.fullmatch(tag)}
                if others | ours != set(there):
                    client.update_flow_run(UUID(flow_run.id), tags=sorted(others | ours))
    with tags(*ours):
        yield


def _link(url: str | None) -> str:
    if url is None:
        return "none yet"
    return f"[{url}]({url if '://' in url else Path(url).absolute().as_uri()})"


@contextmanager
def _only_logged(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever is wrong with a view, the run goes on
        logger: Any = get_run_logger()
        logger.warning("%s could not be shown in Prefect: %s", what, error)
