"""A run's metrics in MLflow, on a server or in a database."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

from storage.addresses import canonical_json, sha256_hex
from tasks.tracked_metrics import Series
from tasks.tracker_config import MlflowTracker

_T = TypeVar("_T")

# MLflow finds its run by this tag, so that a resumed run goes on in it.
_IDENTITY_TAG = "selftrain.id"
# At most so many in a request (https://mlflow.org/docs/latest/rest-api.html, "Log Batch").
_METRICS_A_REQUEST, _PARAMS_A_REQUEST = 1000, 100
_MAX_PARAM_LENGTH = 500
_ENDS = {"done": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
# A server that is down must not hold up a run; nor may MLflow print where --json does, or report.
_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class MlflowRun:
    """The run in MLflow that stands for one run of a store; made where it is not there."""

    def __init__(
        self, config: MlflowTracker, *, store: str, run: str, params: Mapping[str, Any]
    ) -> None:
        """Say which; nothing is sent yet.

        Args:
            config: where MLflow is.
            store: URL of the store.
            run: name of the run.
            params: of the run, shown beside its metrics.
        """
        self._config = config
        self._name = run
        self._params = {name: str(value)[:_MAX_PARAM_LENGTH] for name, value in params.items()}
        identity = sha256_hex(canonical_json([store, run]))
        self._tags = {_IDENTITY_TAG: identity, "selftrain.store": store, "selftrain.run": run}
        self._client: Any = None
        self._run_id = ""
        self._last: dict[str, int] = {}

    def write(self, series: Sequence[Series], *, state: str, tags: Mapping[str, str]) -> int:
        """Send the points that MLflow does not hold yet, and return how many these were.

        Args:
            series: all that is known of the run.
            state: as `selftrain status` says it.
            tags: to set or replace.
        Raises: MlflowException, and what the database or the network raise.
        """
        for name, value in _DEFAULTS.items():
            os.environ.setdefault(name, value)
        from mlflow.entities import Metric

        try:
            client: Any = self._client or self._open()
            now = time.time()
            missing = [
                Metric(key, point.value, int(1000 * (point.time or now)), point.step)
                for one in series
                for key in [_key(one)]
                for point in one.after(self._last.get(key))
            ]
            for some in _in_parts(missing, _METRICS_A_REQUEST):
                client.log_batch(self._run_id, metrics=some)
            self._last |= {metric.key: metric.step for metric in missing}
            for name, value in tags.items():
                client.set_tag(self._run_id, name, value)
            if state in _ENDS:
                client.set_terminated(self._run_id, status=_ENDS[state])
            else:
                client.update_run(self._run_id, status="RUNNING")
        except BaseException:
            self._client = None  # it is not known what arrived: MLflow will tell
            raise
        return len(missing)

    def _open(self) -> Any:
        """Find or make the run, learn what it holds, and return MLflow's client."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        client = MlflowClient(self._config.uri)
        experiment = client.get_experiment_by_name(self._config.experiment)
        if experiment is None:
            experiment_id = client.create_experiment(self._config.experiment)
        else:
            experiment_id = experiment.experiment_id
        wanted = f"tags.`{_IDENTITY_TAG}` = '{self._tags[_IDENTITY_TAG]}'"
        # The oldest, should two drivers ever have made one each.
        found = client.search_runs(
            [experiment_id], wanted, max_results=1, order_by=["attributes.start_time ASC"]
        )
        run = found[0] if found else None
        if run is None:
            run = client.create_run(experiment_id, run_name=self._name, tags=self._tags)
        self._run_id = run.info.run_id
        params = [
            Param(name, value)
            for name, value in self._params.items()
            if name not in run.data.params  # they cannot be changed
        ]
        for some in _in_parts(params, _PARAMS_A_REQUEST):
            client.log_batch(self._run_id, params=some)
        self._last = {
            key: max(metric.step for metric in client.get_metric_history(self._run_id, key))
            # All of them: what is not among the series now may come later.
            for key in run.data.metrics
        }
        self._client = client
        return client


def _key(series: Series) -> str:
    return f"{series.group}/{series.name}"


def _in_parts(items: Sequence[_T], size: int) -> Iterator[list[_T]]:
    rest = iter(items)
    while part := list(islice(rest, size)):
        yield part
