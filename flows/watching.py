"""What a run tells the Prefect server of itself, for automations to act on."""

import threading
from time import monotonic
from typing import Any

from prefect.runtime import deployment, flow_run

from flows.alerts import Balance, balance_of, signs_of_collapse
from flows.opening import OpenRun
from flows.run_events import COLLAPSE, PROGRESS, WORSE, emit_run_event, related_to
from storage.corpus import load_corpus
from storage.manifest import Manifest
from tasks.evaluation import read_report
from tasks.progress import Progress
from tasks.selection import read_summary

SECONDS_BETWEEN_SIGNS = 300.0


class Watcher:
    """Emits the events of one attempt at a run; made in the flow's own thread."""

    def __init__(self, run: OpenRun) -> None:
        """Watch a run that is about to begin."""
        self._run = run
        # Taken here, since a stage reports its progress from threads that know no flow run.
        self._related = related_to(flow_run.id, flow_run.name, deployment.id)
        self._balance: Balance | None = None
        self._lock = threading.Lock()
        self._told_at = monotonic()
        self._told: dict[str, int] = {}

    def tell(self, event: str, **payload: Any) -> None:
        """Emit an event of the run."""
        emit_run_event(
            event,
            run=self._run.name,
            store=self._run.store.url,
            payload=payload,
            related=self._related,
        )

    def on_progress(self, progress: Progress) -> None:
        """Emit now and then that a stage goes on; from any thread, a few times a second."""
        with self._lock:
            now = monotonic()
            if now - self._told_at < SECONDS_BETWEEN_SIGNS:
                return
            if progress.done <= self._told.get(progress.stage, -1):
                return  # it reports, but does not get on
            self._told_at = now
            self._told[progress.stage] = progress.done
        self.tell(
            PROGRESS,
            stage=progress.stage,
            done=progress.done,
            total=progress.total,
            unit=progress.unit,
        )

    def on_stage(self, kind: str, round_index: int, manifest: Manifest, *, is_reused: bool) -> None:
        """Emit that a stage is done, and what is wrong with what it made; nothing twice.

        A stage that is reused was told of by whoever computed it.
        """
        if not is_reused:
            self.tell(PROGRESS, stage=kind, round_index=round_index)
        if kind == "select":
            self._selected(round_index, manifest, is_reused=is_reused)
        if kind == "promote" and not is_reused:
            self._decided(round_index, manifest)

    def _selected(self, round_index: int, manifest: Manifest, *, is_reused: bool) -> None:
        counts = load_corpus(self._run.store, self._run.pins.labeled).label_counts()
        by_class = [counts.get(i, 0) for i in range(len(self._run.pins.class_names))]
        before = self._balance
        now = self._balance = balance_of(read_summary(self._run.store, manifest), by_class)
        signs = [] if before is None else signs_of_collapse(before, now)
        if before is None or not signs or is_reused:
            return
        self.tell(
            COLLAPSE,
            round_index=round_index,
            signs=signs,
            before=before.to_json(),
            now=now.to_json(),
        )

    def _decided(self, round_index: int, manifest: Manifest) -> None:
        report = read_report(self._run.store, manifest)
        if not report["is_promoted"]:
            self.tell(
                WORSE,
                round_index=round_index,
                difference=report["difference"],
                interval=report["interval"],
            )
