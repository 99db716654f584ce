"""What a run's stages have cost: device time, and what they left in the store."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from storage.manifest import Manifest, read_provenance
from storage.store import Store
from tasks.specifications import folder_of, read_result


@dataclass(frozen=True)
class StageCost:
    """One finished stage.

    Attributes:
        kind: of the stage.
        fingerprint: of the stage.
        is_reused: whether the run found it in the store.
        processes: that computed it, each on a device of its own; None where that was not recorded.
        seconds: of the attempt that finished it; None where a kill came before they were written.
        num_bytes: that it left in the store; None where that was not recorded.
    """

    kind: str
    fingerprint: str
    is_reused: bool
    processes: int | None
    seconds: float | None
    num_bytes: int | None

    @property
    def device_seconds(self) -> float | None:
        """Time of all its processes together."""
        return None if self.seconds is None else self.seconds * (self.processes or 1)


@dataclass(frozen=True)
class CostTotal:
    """The stages of one kind, or all of them.

    Attributes:
        name: the kind, or "all".
        stages: how many are finished.
        reused: how many of them the run found in the store.
        device_seconds: of those that it computed.
        reused_device_seconds: of those that it found.
        num_bytes: in the store, whoever wrote them.
        num_unknown: stages of which time or bytes are not recorded, and so left out.
    """

    name: str
    stages: int
    reused: int
    device_seconds: float
    reused_device_seconds: float
    num_bytes: int
    num_unknown: int


def stage_costs(store: Store, status: Mapping[str, Any]) -> list[StageCost]:
    """Return the cost of every finished stage of a run, each once, in the order of the run."""
    models = [*status["rounds"], *([status["baseline"]] if status["baseline"] else [])]
    costs: dict[str, StageCost] = {}
    for stage in (stage for one in models for stage in one["stages"]):
        if stage["state"] not in ("done", "reused") or stage["fingerprint"] in costs:
            continue
        kind, fingerprint = stage["kind"], stage["fingerprint"]
        manifest = read_result(store, kind, fingerprint)
        if manifest is None:  # deleted since the status was read
            continue
        facts = read_provenance(store, folder_of(kind, fingerprint)) or {}
        costs[fingerprint] = StageCost(
            kind=kind,
            fingerprint=fingerprint,
            is_reused=stage["state"] == "reused",
            processes=facts.get("processes"),
            seconds=facts.get("seconds"),
            num_bytes=_num_bytes(manifest),
        )
    return list(costs.values())


def cost_totals(costs: Sequence[StageCost]) -> list[CostTotal]:
    """Return the costs by kind, in the order in which the kinds occur, and of all stages last."""
    kinds = list(dict.fromkeys(one.kind for one in costs))
    return [
        *(_total(kind, [one for one in costs if one.kind == kind]) for kind in kinds),
        _total("all", costs),
    ]


def _num_bytes(manifest: Manifest) -> int | None:
    """Return the bytes of a stage's data objects; of a labelling, those that its records name."""
    if manifest.kind == "label":
        return manifest.counts.get("bytes")
    return sum(stored.size for stored in manifest.objects)


def _total(name: str, costs: Sequence[StageCost]) -> CostTotal:
    return CostTotal(
        name=name,
        stages=len(costs),
        reused=sum(one.is_reused for one in costs),
        device_seconds=_sum(one.device_seconds for one in costs if not one.is_reused),
        reused_device_seconds=_sum(one.device_seconds for one in costs if one.is_reused),
        num_bytes=int(_sum(one.num_bytes for one in costs)),
        num_unknown=sum(one.seconds is None or one.num_bytes is None for one in costs),
    )


def _sum(numbers: Iterable[float | None]) -> float:
    return sum(number for number in numbers if number is not None)
