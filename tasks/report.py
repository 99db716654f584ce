"""The report of a run: one self-contained HTML page."""

from typing import Any

from storage.runs import write_view
from storage.store import Store


def write_report(store: Store, status: dict[str, Any], inputs: dict[str, Any]) -> str:
    """Write the report and return its URL."""
    return write_view(store, status["run"], "report.html", b"<html></html>")
