"""What may not be learned, whatever the teacher says of it: leaked images, and those out of domain.

Leaked are copies of dev or test images, found by `tasks/guarding.py`. How the gates are closed is
in `tasks/gating.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from models.out_of_domain import FinishedGate, Outputs, is_in_domain
from storage.prediction_columns import PredictionColumns
from storage.selections import Reason


@dataclass(frozen=True)
class Gates:
    """What every pass needs to know of the gates.

    Attributes:
        leaked: stem -> in-shard keys of copies of dev and test images; shards without are left out.
        out_of_domain: the finished gate; None where there is none.
    """

    leaked: Mapping[str, frozenset[str]] = field(default_factory=dict, repr=False)
    out_of_domain: FinishedGate | None = None

    def judges(self, stem: str) -> bool:
        """Return whether a gate may turn down a row of a shard."""
        return self.out_of_domain is not None or bool(self.leaked.get(stem))

    def of_shards(self, stems: Sequence[str]) -> "Gates":
        """Return the gates of some of the shards."""
        leaked = {stem: self.leaked[stem] for stem in stems if stem in self.leaked}
        return replace(self, leaked=leaked)

    def reasons(
        self, stem: str, *, keys: Callable[[], Sequence[str]], outputs: Callable[[], Outputs]
    ) -> NDArray[np.int8] | None:
        """Return why rows of a shard are turned down, (N,): LEAKED, OUT_OF_DOMAIN; KEPT where not.

        Args:
            stem: of the shard.
            keys: reads the in-shard keys, if they are needed.
            outputs: reads what the out-of-domain gate judges by, if it is needed.
        Returns: None where no gate says anything of this shard.
        """
        leaked = self.leaked.get(stem)
        reasons = None
        if self.out_of_domain is not None:
            is_in = is_in_domain(self.out_of_domain, outputs())
            reasons = np.where(is_in, Reason.KEPT, Reason.OUT_OF_DOMAIN).astype(np.int8)
        if leaked:
            is_leaked = np.array([key in leaked for key in keys()], dtype=np.bool_)
            reasons = np.zeros(len(is_leaked), np.int8) if reasons is None else reasons
            reasons[is_leaked] = Reason.LEAKED
        return reasons


NO_GATES = Gates()
"""Nothing is turned down."""


def outputs_of(columns: PredictionColumns) -> Outputs:
    """Read what a gate judges the predictions of a shard by."""
    found = columns.read(["confidence", "margin", "entropy", "logsumexp"])
    return Outputs(found["confidence"], found["margin"], found["entropy"], found["logsumexp"])
