"""What the Prefect UI shows of a run beside its states: artifacts and tags.

They are views. One that cannot be written is logged, and the run goes on.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

from prefect import get_run_logger, tags
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run

from flows.latest_teachers import series_of
from flows.run_status import RunStatus, table_rows
from storage.store import Store
from tasks import report_facts as facts
from tasks import report_selection_figures as figures
from tasks.report_svg import draw_png

_ROUND_TAG = re.compile(r"round-\d+|baseline")


def artifact_key(*parts: str) -> str:
    """Return a key of the parts: lower case, digits and dashes are all that Prefect allows."""
    return re.sub(r"[^a-z0-9]", "-", "-".join(parts).lower())


def show_results(store: Store, status: RunStatus) -> None:
    """Show a table of the rounds so far, where report and model are, and two figures."""
    with _only_logged(f"results of run {status.run}"):
        create_markdown_artifact(
            results_page(status, os.environ.get("SELFTRAIN_STORE_WEB_URL")),
            key=artifact_key("results", status.run),
            description=f"Run {status.run}: {status.in_words()}",
        )
    show_figures(store, status)


def results_page(status: RunStatus, web_url: str | None) -> str:
    """Return a run's results as the Markdown of an artifact.

    Args:
        status: of the run.
        web_url: http address under which browsers find the store. None: there are no links, since
            no browser follows one from a page of a server to a file, and none opens `s3://`.
    Raises: ValueError for an address that is none, or that shows a password to all who look.
    """
    parts = [_results_table(status), f"**State:** {status.in_words()}"]
    places = {"report": status.report_url}
    if status.model_url is not None:
        places["model"] = status.model_url
    if web_url:
        root = _checked(web_url)
        # A folder has no page on most servers; a model's manifest names its files.
        names = {"report": "", "model": "/manifest.json"}
        links = [
            f"[{name}]({root}{url.removeprefix(status.store)}{names[name]})"
            for name, url in places.items()
        ]
        parts.append(f"**Open:** {', '.join(links)}")
    # A block of code scrolls where the page is narrower than a path.
    parts.append("\n".join(["```", *(f"{name}: {url}" for name, url in places.items()), "```"]))
    return "\n\n".join(parts)


def _results_table(status: RunStatus) -> str:
    """Return the rounds as a table that the column of an artifact has room for."""
    lines = [
        "| round | dev accuracy | test accuracy | pseudo-labels | precision | promoted |",
        "|---|---|---|---|---|---|",
    ]
    for name, architecture, dev, test, pseudo, precision, promoted, seconds in table_rows(status):
        cells = [
            f"**{name}**<br>{architecture}<br>{seconds} s",
            *(text.replace(" [", "<br>[").replace(" (", "<br>(") for text in (dev, test, pseudo)),
            precision,
            promoted,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + (
        f"\n\n{status.labels_in_words()}; accuracies with 95 % intervals."
        " Pseudo-labels are counted with their copies."
    )


def _checked(web_url: str) -> str:
    parts = urlsplit(web_url)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        shown = "a URL with credentials" if "@" in parts.netloc else repr(web_url)
        raise ValueError(
            f"SELFTRAIN_STORE_WEB_URL is {shown}: give the http or https address under which"
            " browsers find the store, without credentials"
        )
    return web_url.rstrip("/")


def show_figures(store: Store, status: RunStatus) -> None:
    """Show confidences and class balance of the selections; nothing before any.

    They are pictures in Markdown: under an artifact of type image the UI (3.8.8) writes the
    picture's bytes out, across half the page.
    """
    drawings: dict[str, tuple[str, Callable[..., str | None]]] = {
        "confidence": ("Kept and rejected predictions by confidence", figures.confidence_figure),
        "classes": ("Samples per class before and after selection", figures.class_balance_figure),
    }
    with _only_logged(f"figures of run {status.run}"):
        chosen = facts.selections(store, status.to_json())
        for name, (title, draw) in drawings.items():
            image = draw(chosen, draw_png)
            if image is not None:
                create_markdown_artifact(
                    f"![{title}]({image})",
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


@contextmanager
def _only_logged(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever is wrong with a view, the run goes on
        logger: Any = get_run_logger()
        logger.warning("%s could not be shown in Prefect: %s", what, error)
