"""A run that asks a person: it ends, is answered in the UI's form or by hand, and goes on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client

from flows.approvals import AlreadyDecided
from flows.approving import ApprovalForm, approve
from flows.config import SelfTrainingConfig
from flows.run_status import read_status
from flows.self_training import self_training
from storage.runs import read_events
from storage.store import open_store
from tasks.specifications import read_result

pytestmark = pytest.mark.usefixtures("prefect_api", "trained_here")

MakeConfig = Callable[..., SelfTrainingConfig]


@pytest.mark.slow
def test_a_student_is_promoted_or_not_as_a_person_says(
    tiny_config: MakeConfig, trained_here: list[str], tmp_path: Path
) -> None:
    store = open_store(str(tmp_path / "store"))
    config = tiny_config(tmp_path / "store", "approve=true", "baseline=false")

    state = self_training(config, return_state=True)

    assert (state.type.value, state.name) == ("COMPLETED", "WaitingForApproval"), "nothing waits"
    assert state.message is not None
    assert "selftrain approve tiny --round 1" in state.message
    asked = read_status(store, "tiny")
    assert asked.state == "waiting_for_approval"
    assert [one.promoted for one in asked.rounds] == [None, None]
    assert asked.model_fingerprint() == asked.rounds[0].fingerprint, "not yet the student's"
    assert asked.waiting_for is not None
    assert asked.waiting_for.model == asked.rounds[1].fingerprint
    assert (tmp_path / "store" / "runs" / "tiny" / "report.html").is_file(), "to look at"
    trained_before = list(trained_here)
    self_training(config)  # nobody has answered: the same question, nothing computed
    assert read_status(store, "tiny").waiting_for == asked.waiting_for
    assert trained_here == trained_before

    # From the form, and the process is gone before it goes on.
    form: dict[str, Any] = {"run": "tiny", "store": store.url, "by": "ada@lab", "round_index": 1}
    recorded = approve(
        ApprovalForm(**form, answer="accept", threshold=0.55, comment="go on", resume=False)
    )
    assert recorded["answer"] == "accept"
    with pytest.raises(AlreadyDecided, match=r"accepted, with threshold 0\.55 by ada@lab"):
        approve(ApprovalForm(run="tiny", store=store.url, by="bob@lab", answer="reject"))
    state = self_training(config, return_state=True)

    assert state.name == "WaitingForApproval", "for the next round's student"
    second = read_status(store, "tiny")
    assert [one.promoted for one in second.rounds] == [None, True, None]
    assert _threshold(store, second, 1) == 0.4
    assert _threshold(store, second, 2) == 0.55

    again: dict[str, Any] = form | {"round_index": 2, "comment": "one class dominates"}
    state = approve(ApprovalForm(**again, answer="reject"), return_state=True)

    assert state.name == "Completed"
    assert state.message is not None
    assert "rejected by ada@lab" in state.message
    done = read_status(store, "tiny")
    assert (done.state, done.stop_reason) == ("done", "rejected")
    assert [one.promoted for one in done.rounds] == [None, True, False]
    assert done.model_fingerprint() == done.rounds[1].fingerprint
    assert [one.answer for one in done.approvals] == ["accept", "reject"]
    assert state.result() == done.to_json()
    report = (tmp_path / "store" / "runs" / "tiny" / "report.html").read_text()
    assert "one class dominates" in report
    flow_run_id = state.state_details.flow_run_id
    assert flow_run_id is not None
    with get_client(sync_client=True) as client:
        assert client.read_flow_run(flow_run_id).name == "reject tiny"


def test_before_each_round_a_person_may_end_the_loop(
    tiny_config: MakeConfig, trained_here: list[str], tmp_path: Path
) -> None:
    store = open_store(str(tmp_path / "store"))
    config = tiny_config(tmp_path / "store", "approve=round")
    num_trained = len(trained_here)
    self_training(config)
    asked = read_status(store, "tiny")
    assert asked.waiting_for is not None
    assert (asked.waiting_for.kind, asked.waiting_for.round_index) == ("round", 0)
    assert "the beginning of round 1" in asked.question_in_words()

    approve(ApprovalForm(run="tiny", store=store.url, by="ada@lab", answer="reject"))

    done = read_status(store, "tiny")
    assert (done.state, done.stop_reason) == ("done", "rejected")
    assert [one.round_index for one in done.rounds] == [0]
    assert done.baseline is None, "there is no student to compare with"
    assert len(trained_here) == num_trained + 1
    assert read_events(store, "tiny")[-1]["type"] == "run_done"


def _threshold(store: Any, status: Any, round_index: int) -> float:
    stages = status.rounds[round_index].stages
    fingerprint = next(stage["fingerprint"] for stage in stages if stage["kind"] == "select")
    manifest = read_result(store, "select", fingerprint)
    assert manifest is not None
    return manifest.settings["selection"]["threshold"]["confidence"]
