"""What a run asks a person before it goes on, and the answers, which are records in the store.

A run that asks has ended: nothing waits and no device is held. An answer is written once, by
whoever is first, and read by the next attempt at the run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import ValidationError

from flows.config import SelfTrainingConfig
from flows.loading import ConfigError
from flows.opening import reopen_run
from storage.runs import append_event, read_decision, read_events, record_decision
from storage.store import Store
from tasks.selection_config import SelectionConfig
from tasks.training_orders import needs_of

APPROVAL_SCHEMA = 1

QuestionKind = Literal["promotion", "round"]
Answer = Literal["accept", "reject"]


class WaitingForApproval(Exception):
    """A run has ended with a question; it goes on once a person has answered."""


class NotWaiting(ValueError):
    """An answer to a question that the run does not ask."""


class AlreadyDecided(ValueError):
    """The question has another answer already."""


@dataclass(frozen=True)
class Question:
    """What a run asks.

    Attributes:
        kind: promotion: whether a round's student becomes the teacher; round: whether the round
            after this one may begin.
        round_index: of the round that has come to its end.
        model: fingerprint of the student, or of the teacher of the next round.
    """

    kind: QuestionKind
    round_index: int
    model: str

    def in_words(self) -> str:
        """Return what would be done if the answer is yes."""
        if self.kind == "promotion":
            return f"the promotion of the student of round {self.round_index}"
        return f"the beginning of round {self.round_index + 1}"


@dataclass(frozen=True)
class Approval:
    """A question with its answer.

    Attributes:
        question: what kind of question.
        round_index: as in the question.
        model: as in the question.
        answer: accept, or reject: the student is not promoted, or no further round begins, and the
            loop ends.
        threshold: confidence that later rounds select by, None: as before.
        comment: why, in the words of who answered.
        by: who answered.
        time: when, UTC, ISO 8601.
    """

    question: QuestionKind
    round_index: int
    model: str
    answer: Answer
    threshold: float | None
    comment: str
    by: str
    time: str

    @property
    def is_accepted(self) -> bool:
        """Whether the run may do what it asked for."""
        return self.answer == "accept"

    def in_words(self) -> str:
        """Return answer, who gave it and when, in one line."""
        verb = "accepted" if self.is_accepted else "rejected"
        threshold = "" if self.threshold is None else f", with threshold {self.threshold:g}"
        comment = f": {self.comment}" if self.comment else ""
        return f"{verb}{threshold} by {self.by} at {self.time}{comment}"

    def to_json(self) -> dict[str, Any]:
        """Return the stored form."""
        return {"schema": APPROVAL_SCHEMA, **asdict(self)}


def read_approval(store: Store, run: str, question: Question) -> Approval | None:
    """Return the answer to a question of a run, None while there is none.

    Raises: ValueError if it was given for another model.
    """
    approval = _read(store, run, question.kind, question.round_index)
    if approval is not None and approval.model != question.model:
        raise ValueError(
            f"run {run!r}: {question.in_words()} was {approval.in_words()}, but for model"
            f" {approval.model}, and now it is about {question.model}: was the store changed by"
            " hand? Run the config under another --name"
        )
    return approval


def read_approval_or_ask(
    store: Store, run: str, question: Question, asked_by: Mapping[str, str]
) -> Approval | None:
    """Return the answer to a question of a run; without one, record that it is asked.

    Args:
        store: that holds the run.
        run: its name.
        question: what it asks.
        asked_by: facts of the event, on who asks.
    Raises: as `read_approval`.
    """
    approval = read_approval(store, run, question)
    if approval is None:
        append_event(
            store,
            run,
            "run_waiting",
            question=question.kind,
            round_index=question.round_index,
            model=question.model,
            **asked_by,
        )
    return approval


def read_approvals(store: Store, run: str, config: SelfTrainingConfig) -> list[Approval]:
    """Return all answers that a run has been given, by round."""
    if config.approve == "none":
        return []
    found: list[Approval] = []
    # The teacher of round 0 is nobody's successor.
    for round_index in range(1 if config.approve == "promotion" else 0, config.rounds + 1):
        approval = _read(store, run, config.approve, round_index)
        if approval is None:
            break  # a run asks of one round after the other
        found.append(approval)
    return found


def thresholds_by_round(approvals: Sequence[Approval]) -> dict[int, float]:
    """Return the confidences that were given with answers, by the first round that they hold in."""
    return {one.round_index + 1: one.threshold for one in approvals if one.threshold is not None}


def with_threshold(selection: SelectionConfig, confidence: float) -> SelectionConfig:
    """Return the rules with another confidence, 0 to 1, as their threshold.

    Raises: ConfigError for a rule that has no such setting, or a value that does not fit.
    """
    threshold = selection.threshold
    if "confidence" not in type(threshold).model_fields:
        raise ConfigError(
            f"threshold {confidence:g}: selection.threshold.kind={threshold.kind} has no confidence"
            " to set. Answer without, or run another config under another --name"
        )
    try:
        changed = type(threshold).model_validate(
            threshold.model_dump() | {"confidence": confidence}
        )
    except ValidationError as error:
        rule = error.errors(include_url=False)[0]["msg"]
        raise ConfigError(f"threshold {confidence:g}: {rule}") from None
    return selection.model_copy(update={"threshold": changed})


def open_question(store: Store, run: str) -> Question | None:
    """Return what a run asked last, answered or not, None if it never asked."""
    for event in reversed(read_events(store, run)):
        if event["type"] == "run_waiting":
            return Question(event["question"], event["round_index"], event["model"])
    return None


def answer(
    store: Store,
    run: str,
    choice: Answer,
    *,
    by: str,
    threshold: float | None = None,
    comment: str = "",
    round_index: int | None = None,
) -> tuple[Approval, bool]:
    """Record the answer to what a run asks; return the answer there is, and whether it is this one.

    The same answer once more is no error: it is what somebody does who was cut off.

    Args:
        store: that holds the run.
        run: its name.
        choice: the answer.
        by: who answers.
        threshold: confidence for the selections of later rounds.
        comment: kept with it.
        round_index: that the answer is meant for; None: whatever the run asks.
    Raises: UnknownRun; NotWaiting; AlreadyDecided, saying by whom and when; ConfigError for a
        threshold that could not take effect.
    """
    config = reopen_run(store, run).config
    question = open_question(store, run)
    if question is None:
        raise NotWaiting(
            f"run {run!r} does not wait for approval; its config says approve: {config.approve}."
            f" See selftrain status {run}"
        )
    if round_index is not None and round_index != question.round_index:
        raise NotWaiting(
            f"round {round_index}: run {run!r} asks for {question.in_words()}. Look at it, then"
            f" answer for round {question.round_index}"
        )
    if threshold is not None:
        _check_threshold(config, question, choice, threshold)
    ours = Approval(
        question=question.kind,
        round_index=question.round_index,
        model=question.model,
        answer=choice,
        threshold=threshold,
        comment=comment,
        by=by,
        time=datetime.now(UTC).isoformat(timespec="milliseconds"),
    )
    there = _from_json(record_decision(store, run, _name(question), ours.to_json()))
    if (there.answer, there.threshold) != (ours.answer, ours.threshold):
        raise AlreadyDecided(
            f"run {run!r}: {question.in_words()} was already {there.in_words()}. The first answer"
            " stands; to do otherwise, run the config under another --name"
        )
    return there, there == ours


def _check_threshold(
    config: SelfTrainingConfig, question: Question, choice: Answer, threshold: float
) -> None:
    following = question.round_index + 1
    if choice == "reject" or following > config.rounds:
        raise ConfigError(
            f"threshold {threshold:g}: no selection would read it, because the loop ends"
            f" {'with a rejection' if choice == 'reject' else f'after round {config.rounds}'}."
            " Leave it out"
        )
    assert config.student is not None, "runs with rounds have a student"
    if not needs_of(config.student.for_round(following)).selection:
        raise ConfigError(
            f"threshold {threshold:g}: student.objective.kind={config.student.objective.kind} reads"
            " no stored pseudo-labels. Leave it out"
        )
    with_threshold(config.selection, threshold)


def _name(question: Question) -> str:
    return f"{question.kind}-{question.round_index}"


def _read(store: Store, run: str, kind: QuestionKind, round_index: int) -> Approval | None:
    body = read_decision(store, run, f"{kind}-{round_index}")
    return None if body is None else _from_json(body)


def _from_json(body: dict[str, Any]) -> Approval:
    return Approval(**{key: body[key] for key in Approval.__dataclass_fields__})
