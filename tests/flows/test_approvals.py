"""Answers to what a run asks: recorded once, read by plan, graph and status."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flows import running
from flows.approvals import (
    AlreadyDecided,
    Answer,
    Approval,
    NotWaiting,
    Question,
    WaitingForApproval,
    answer,
    read_approval,
    read_approvals,
    thresholds_by_round,
)
from flows.cli import app
from flows.config import SelfTrainingConfig
from flows.graph import RunGraph
from flows.loading import ConfigError
from flows.opening import Pins, open_run
from flows.planning import plan_run
from flows.run_status import read_status
from storage.manifest import CorruptRecord
from storage.runs import UnknownRun, append_event
from storage.store import Store

MakeConfig = Callable[..., SelfTrainingConfig]
STUDENT = "5" * 64
PINS = Pins("1" * 64, "2" * 64, "3" * 64, "4" * 64, ("a", "b", "c"))


@pytest.fixture
def store(lab: Any, tmp_path: Path) -> Store:
    return lab.in_empty_store(tmp_path / "own").store


@pytest.fixture
def waiting(store: Store, tiny_config: MakeConfig) -> SelfTrainingConfig:
    """A run that waits for the promotion of the student of round 1."""
    config = tiny_config(store.url, "approve=promotion")
    open_run(store, config)
    ask(store)
    return config


def ask(store: Store, *, round_index: int = 1, kind: str = "promotion") -> None:
    append_event(store, "tiny", "run_started")
    append_event(
        store, "tiny", "run_waiting", question=kind, round_index=round_index, model=STUDENT
    )


def test_true_asks_before_promotion_and_false_nobody(tiny_config: MakeConfig) -> None:
    assert tiny_config("s", "approve=true").approve == "promotion"
    assert tiny_config("s", "approve=false").approve == "none"
    assert tiny_config("s").approve == "none"
    with pytest.raises(ConfigError, match=r"approve = 'sometimes'"):
        tiny_config("s", "approve=sometimes")
    with pytest.raises(ConfigError, match="so approve, selection cannot take effect"):
        tiny_config("s", "rounds=0", "student=null", "baseline=false", "approve=round")


def test_approval_is_in_no_fingerprint(
    tiny_config: MakeConfig, fingerprints_of: Callable[[RunGraph], dict[str, str]]
) -> None:
    plain, asking = (
        fingerprints_of(RunGraph(tiny_config("s", f"approve={choice}"), PINS))
        for choice in ("none", "promotion")
    )
    assert plain == asking


def test_an_answer_is_recorded_with_who_when_and_what(
    store: Store, waiting: SelfTrainingConfig
) -> None:
    given, is_new = answer(
        store, "tiny", "accept", by="ada@lab", threshold=0.7, comment="looks balanced"
    )

    assert is_new
    assert (given.question, given.round_index, given.model) == ("promotion", 1, STUDENT)
    assert (given.answer, given.threshold, given.by) == ("accept", 0.7, "ada@lab")
    assert given.comment == "looks balanced"
    assert given.time.endswith("+00:00")
    path = Path(store.url) / "runs" / "tiny" / "decisions" / "promotion-1.json"
    assert json.loads(path.read_text())["by"] == "ada@lab"
    assert read_approval(store, "tiny", Question("promotion", 1, STUDENT)) == given
    assert read_approvals(store, "tiny", waiting) == [given]
    path.write_bytes(path.read_bytes().replace(b"ada@lab", b"eve@lab"))
    with pytest.raises(CorruptRecord):
        read_approvals(store, "tiny", waiting)


def test_the_first_of_two_answers_stands_and_the_second_is_told_by_whom(
    store: Store, waiting: SelfTrainingConfig
) -> None:
    first, _ = answer(store, "tiny", "accept", by="ada@lab")
    others: list[tuple[Answer, float | None]] = [("reject", None), ("accept", 0.9)]
    for choice, threshold in others:
        with pytest.raises(AlreadyDecided) as refused:
            answer(store, "tiny", choice, by="bob@lab", threshold=threshold)
        assert f"accepted by ada@lab at {first.time}" in str(refused.value)
    assert read_approvals(store, "tiny", waiting) == [first]


def test_the_same_answer_again_changes_nothing(store: Store, waiting: SelfTrainingConfig) -> None:
    first, _ = answer(store, "tiny", "reject", by="ada@lab")
    again, is_new = answer(store, "tiny", "reject", by="bob@lab")
    assert again == first
    assert not is_new


def test_an_answer_to_what_nobody_asked_is_refused(
    store: Store, tiny_config: MakeConfig, waiting: SelfTrainingConfig
) -> None:
    with pytest.raises(UnknownRun):
        answer(store, "another", "accept", by="ada")
    open_run(store, tiny_config(store.url, name="plain"))
    with pytest.raises(NotWaiting, match=r"config says approve: none"):
        answer(store, "plain", "accept", by="ada")
    with pytest.raises(NotWaiting, match=r"round 2: run 'tiny' asks for the promotion of the stud"):
        answer(store, "tiny", "accept", by="ada", round_index=2)
    assert read_approvals(store, "tiny", waiting) == []


def test_a_threshold_that_nothing_would_read_is_refused(
    store: Store, tiny_config: MakeConfig, waiting: SelfTrainingConfig
) -> None:
    with pytest.raises(ConfigError, match="ends with a rejection"):
        answer(store, "tiny", "reject", by="ada", threshold=0.5)
    with pytest.raises(ConfigError, match="less than or equal to 1"):
        answer(store, "tiny", "accept", by="ada", threshold=1.5)
    ask(store, round_index=2)
    with pytest.raises(ConfigError, match="after round 2"):
        answer(store, "tiny", "accept", by="ada", threshold=0.5)
    percentile = "selection={threshold: {kind: percentile}}"
    open_run(store, tiny_config(store.url, "approve=round", percentile, name="percentile"))
    append_event(store, "percentile", "run_waiting", question="round", round_index=0, model=STUDENT)
    with pytest.raises(ConfigError, match=r"selection\.threshold\.kind=percentile has no conf"):
        answer(store, "percentile", "accept", by="ada", threshold=0.5)


def test_a_decision_about_another_model_is_an_error_that_names_both(
    store: Store, waiting: SelfTrainingConfig
) -> None:
    answer(store, "tiny", "accept", by="ada")
    with pytest.raises(ValueError, match=f"{STUDENT}, and now it is about {'6' * 64}"):
        read_approval(store, "tiny", Question("promotion", 1, "6" * 64))


def test_a_threshold_holds_from_the_next_round_on_until_another_is_given(
    tiny_config: MakeConfig,
) -> None:
    config = tiny_config("s", "rounds=4", "approve=round")
    approvals = [
        Approval("round", index, STUDENT, "accept", threshold, "", "ada", "2026-01-01T00:00:00Z")
        for index, threshold in enumerate([None, 0.6, None, 0.8])
    ]
    graph = RunGraph(config, PINS, thresholds=thresholds_by_round(approvals))

    confidences = [graph.selection_rules(index).threshold for index in (1, 2, 3, 4)]

    assert [getattr(one, "confidence", None) for one in confidences] == [0.4, 0.6, 0.6, 0.8]
    plain = RunGraph(config, PINS)
    teacher = plain.first_model()
    changed = [
        plain.select(teacher, index).fingerprint != graph.select(teacher, index).fingerprint
        for index in (1, 2, 3, 4)
    ]
    assert changed == [False, True, True, True]


def test_status_and_plan_know_the_answer(store: Store, waiting: SelfTrainingConfig) -> None:
    asked = read_status(store, "tiny")
    assert asked.state == "waiting_for_approval"
    assert asked.to_json()["waiting_for"] == {
        "kind": "promotion",
        "round_index": 1,
        "model": STUDENT,
    }
    before = plan_run(store, waiting)

    given, _ = answer(store, "tiny", "accept", by="ada", threshold=0.7)

    answered = read_status(store, "tiny")
    assert (answered.state, answered.waiting_for) == ("stopped", None)
    assert answered.to_json()["approvals"] == [given.to_json()]
    after = plan_run(store, waiting)
    same = [one.fingerprint == other.fingerprint for one, other in zip(before, after, strict=True)]
    kinds = [one.kind for one in before]
    second = len(kinds) - kinds[::-1].index("select") - 1
    assert all(same[:second]), "what came before"
    assert not any(same[second : second + 2]), "the selection of round 2 and its student"


def test_the_command_records_says_how_to_go_on_and_refuses_with_exit_code_2(
    store: Store, waiting: SelfTrainingConfig
) -> None:
    approve = ["approve", "tiny", "--store", store.url, "--no-resume"]
    done = CliRunner().invoke(app, [*approve, "--by", "ada@lab", "--comment", "fine", "--json"])
    assert done.exit_code == 0, done.stderr
    shown = json.loads(done.stdout)
    assert (shown["schema"], shown["run"], shown["answer"]) == (1, "tiny", "accept")
    assert (shown["by"], shown["comment"]) == ("ada@lab", "fine")
    assert f"selftrain resume tiny --store {store.url}" in done.stderr

    refused = CliRunner().invoke(app, [*approve, "--reject"])
    assert refused.exit_code == 2
    assert "already accepted by ada@lab" in refused.stderr
    assert "@" in str(read_approvals(store, "tiny", waiting)[0].by)


def test_a_run_that_asks_ends_the_command_with_the_question(
    store: Store, waiting: SelfTrainingConfig, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(running, "run_to_end", lambda config: "hint")
    for stage in ("validate",):
        for round_index in (0, 1):
            append_event(
                store,
                "tiny",
                "stage_referenced",
                kind=stage,
                role="student",
                round_index=round_index,
                fingerprint=str(7 + round_index) * 64,
            )
    ask(store)

    with pytest.raises(WaitingForApproval) as question:
        running.run_and_show(waiting, as_json=True)

    assert json.loads(capsys.readouterr().out)["state"] == "waiting_for_approval"
    message = str(question.value)
    assert "waits for approval of the promotion of the student of round 1" in message
    assert f"selftrain approve tiny --round 1 --store {store.url}" in message
