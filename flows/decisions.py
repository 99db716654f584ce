"""How far a run is known to go: promotions, accuracies and answers that the store has already."""

from collections.abc import Sequence
from dataclasses import dataclass

from flows.approvals import Approval, QuestionKind
from flows.config import SelfTrainingConfig
from flows.graph import ModelRef, RunGraph
from flows.stopping import has_stalled
from storage.store import Store


@dataclass(frozen=True)
class Decisions:
    """What is decided of a run's rounds: True, False, or None as long as nobody knows.

    Attributes:
        store: that holds its stages.
        config: of the run.
        graph: its stages.
        approvals: the answers that it was given.
    """

    store: Store
    config: SelfTrainingConfig
    graph: RunGraph
    approvals: Sequence[Approval]

    def may_begin(self, round_index: int) -> bool | None:
        """Return whether a round may begin, as far as a person is asked."""
        return self._is_approved("round", round_index - 1)

    def goes_on_with(self, models: Sequence[ModelRef]) -> bool | None:
        """Return whether the last of the models becomes the teacher of another round.

        Args:
            models: of round 0, 1, ..., each the teacher of the next one; two at least.
        """
        teacher, student = models[-2:]
        promotion = self.graph.promote(teacher, student).result(self.store)
        if promotion is None:
            return None
        if not promotion.counts["is_promoted"]:
            return False
        approved = self._is_approved("promotion", student.round_index)
        if not approved:
            return approved
        stalled = self._has_stalled(models)
        return None if stalled is None else not stalled

    def _is_approved(self, kind: QuestionKind, round_index: int) -> bool | None:
        if self.config.approve != kind:
            return True
        answers = [one for one in self.approvals if one.round_index == round_index]
        return answers[0].is_accepted if answers else None

    def _has_stalled(self, models: Sequence[ModelRef]) -> bool | None:
        validations = [self.graph.evaluate("validate", one).result(self.store) for one in models]
        accuracies = [float(one.counts["accuracy"]) for one in validations if one is not None]
        if len(accuracies) < len(models):  # one was deleted by hand, and will be made again
            return None
        return has_stalled(accuracies, self.config.stop.patience_rounds)
