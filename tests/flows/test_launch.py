"""The config's `launch`: what it refuses, and that it gets to whoever starts the trainings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import tasks.stages
from flows.config import SelfTrainingConfig
from flows.graph import RunGraph
from flows.self_training import self_training
from tasks.launching import ONE_LOCAL_PROCESS, ExternalLaunch, LocalLaunch, TrainingRefused

MakeConfig = Callable[..., SelfTrainingConfig]

pytestmark = pytest.mark.usefixtures("prefect_api")


def test_a_launch_without_its_kind_is_local_and_absent_it_is_one_process(
    tmp_path: Path, tiny_config: MakeConfig
) -> None:
    assert tiny_config(tmp_path).launch == ONE_LOCAL_PROCESS == LocalLaunch(processes=1)
    assert tiny_config(tmp_path, "launch={processes: auto}").launch == LocalLaunch(processes="auto")
    external = tiny_config(tmp_path, "launch={kind: external, poll_seconds: 2}").launch
    assert external == ExternalLaunch(poll_seconds=2)


def test_processes_that_no_step_divides_among_are_refused_with_the_next_best(
    tmp_path: Path, tiny_config: MakeConfig
) -> None:
    # 6 labelled and 12 pseudo-labelled images a step.
    with pytest.raises(ValidationError) as caught:
        SelfTrainingConfig.model_validate(
            tiny_config(tmp_path).model_dump(by_alias=True) | {"launch": {"processes": 4}}
        )
    message = str(caught.value)
    assert "launch.processes=4 does not fit teacher: 6 labeled images a step" in message
    assert "set batch_size to 4 or 8, or take 3 or 6 parts (ranks)" in message
    assert tiny_config(tmp_path, "launch={processes: 3}").launch == LocalLaunch(processes=3)
    thirds = tiny_config(tmp_path, "student.accumulation_steps=3").model_dump(by_alias=True)
    with pytest.raises(ValidationError, match=r"does not fit student: accumulation_steps=3 micro"):
        SelfTrainingConfig.model_validate(thirds | {"launch": {"processes": 2}})


def test_the_launch_gets_to_the_launcher_and_its_refusal_ends_the_run(
    tmp_path: Path, tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def refuse(store: Any, fingerprint: str, **options: Any) -> None:
        asked.append(options)
        raise TrainingRefused("no machine would take it")

    monkeypatch.setattr(tasks.stages, "launch_worker", refuse)
    with pytest.raises(TrainingRefused, match="no machine would take it"):
        self_training(tiny_config(tmp_path / "store", "launch={processes: 2}"))
    assert [options["launch"] for options in asked] == [LocalLaunch(processes=2)]


def test_a_resumed_run_is_launched_as_it_is_resumed(
    tmp_path: Path, tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, Any]] = []

    def refuse(store: Any, fingerprint: str, **options: Any) -> None:
        asked.append((fingerprint, options["launch"]))
        raise TrainingRefused("no machine would take it")

    monkeypatch.setattr(tasks.stages, "launch_worker", refuse)
    for processes in (1, 2):
        with pytest.raises(TrainingRefused):
            self_training(tiny_config(tmp_path / "store", f"launch={{processes: {processes}}}"))
    (first, alone), (second, together) = asked
    assert first == second  # one training, whose checkpoints are found
    assert (alone, together) == (LocalLaunch(processes=1), LocalLaunch(processes=2))


def test_the_launch_changes_no_fingerprint(tmp_path: Path, tiny_config: MakeConfig) -> None:
    from flows.opening import resolve_inputs
    from storage.store import open_store

    plain = tiny_config(tmp_path / "store")
    launched = tiny_config(tmp_path / "store", "launch={kind: external}")
    pins = resolve_inputs(open_store(str(tmp_path / "store")), plain)
    one, other = (RunGraph(config, pins, None).teacher() for config in (plain, launched))
    assert [t.specification.fingerprint for t in one] == [
        t.specification.fingerprint for t in other
    ]
