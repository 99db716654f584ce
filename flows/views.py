"""What people read of a run, rebuilt from what its store holds."""

from typing import Any

from flows.opening import OpenRun
from flows.run_status import RunStatus, read_status, write_status_view
from tasks.report import write_report


def write_views(run: OpenRun) -> RunStatus:
    """Rebuild run.json and report.html from events and manifests."""
    status = read_status(run.store, run.name)
    write_status_view(run.store, status)
    inputs: dict[str, Any] = {
        "config": run.config.model_dump(mode="json", by_alias=True),
        "class_names": list(run.pins.class_names),
        "unlabeled": run.pins.unlabeled,
    }
    write_report(run.store, status.to_json(), inputs)
    return status
