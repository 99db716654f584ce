"""Runs: config once, events appended, unknown and clashing names explained."""

from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any

import pytest

from storage.manifest import CorruptRecord
from storage.runs import (
    RunExists,
    UnknownRun,
    append_event,
    create_run,
    list_runs,
    read_events,
    read_run_config,
    validate_run_name,
    write_view,
)
from storage.store import Store

CONFIG: dict[str, Any] = {"schema": 1, "seed": 0, "train": {"lr": 0.1, "steps": 5}, "name": "x"}


def test_a_run_is_created_once_and_read_back(store: Store):
    assert create_run(store, "demo", CONFIG) == CONFIG
    assert create_run(store, "demo", CONFIG) == CONFIG
    assert read_run_config(store, "demo") == CONFIG
    assert list_runs(store) == ["demo"]


def test_another_config_under_the_same_name_is_an_error_naming_the_keys(store: Store):
    create_run(store, "demo", CONFIG)
    other = {"schema": 1, "seed": 0, "train": {"lr": 0.2, "steps": 5}, "extra": True}
    with pytest.raises(RunExists) as caught:
        create_run(store, "demo", other)
    message = str(caught.value)
    assert "extra is absent there, true asked for" in message
    assert 'name is "x" there, absent in what is asked for' in message
    assert "train.lr is 0.1 there, 0.2 asked for" in message
    assert "seed" not in message
    assert "steps" not in message
    assert "selftrain resume demo" in message
    assert read_run_config(store, "demo") == CONFIG


def test_many_differences_are_named_up_to_eight(local_store: Store):
    create_run(local_store, "demo", {f"k{i}": i for i in range(20)})
    with pytest.raises(RunExists, match="and 12 more"):
        create_run(local_store, "demo", {f"k{i}": -1 for i in range(20)})


def test_an_unknown_run_lists_the_known_ones(store: Store):
    with pytest.raises(UnknownRun, match=r"there is no run 'demo' in .*; known runs: none"):
        read_run_config(store, "demo")
    create_run(store, "nightly", CONFIG)
    create_run(store, "big.run-2", CONFIG)
    append_event(store, "no-config", "started")
    with pytest.raises(UnknownRun, match=r"known runs: big\.run-2, nightly$"):
        read_run_config(store, "demo")


def test_of_8_racing_creators_one_config_stays(store: Store):
    def create(index: int) -> int:
        try:
            return create_run(store, "demo", {"writer": index})["writer"]
        except RunExists:
            return -1

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(create, range(8)))
    winner = read_run_config(store, "demo")["writer"]
    assert {r for r in results if r >= 0} == {winner}


def test_events_come_back_in_the_order_of_their_appending(store: Store):
    assert read_events(store, "demo") == []
    for index in range(12):
        append_event(store, "demo", "stage_done", fingerprint=f"f{index}", seconds=0.5)
    events = read_events(store, "demo")
    assert [event["fingerprint"] for event in events] == [f"f{i}" for i in range(12)]
    assert [event["counter"] for event in events] == list(range(12))
    assert {event["type"] for event in events} == {"stage_done"}
    time = datetime.fromisoformat(events[0]["time"])
    assert time.utcoffset() == timedelta(0)


def test_concurrent_appends_lose_nothing(store: Store):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: append_event(store, "demo", "tick", index=i), range(24)))
    events = read_events(store, "demo")
    assert sorted(event["index"] for event in events) == list(range(24))
    assert [(e["counter"], e["id"]) for e in events] == sorted(
        (e["counter"], e["id"]) for e in events
    )


def test_facts_cannot_hide_what_an_event_says_of_itself(local_store: Store):
    with pytest.raises(ValueError, match="time"):
        append_event(local_store, "demo", "x", time="yesterday")


def test_a_damaged_event_is_an_error_and_not_left_out(local_store: Store):
    append_event(local_store, "demo", "a")
    append_event(local_store, "demo", "b")
    path = local_store.list("runs/demo/events")[1]
    local_store.replace(path, local_store.read(path).replace(b'"b"', b'"c"'))
    with pytest.raises(CorruptRecord, match="damaged"):
        read_events(local_store, "demo")


def test_views_are_rebuilt_at_will_and_never_the_config(store: Store):
    write_view(store, "demo", "run.json", b"{}")
    url = write_view(store, "demo", "run.json", b'{"state":"done"}')
    assert url == store.url_of("runs/demo/run.json")
    assert store.read("runs/demo/run.json") == b'{"state":"done"}'
    for name in ("config.json", "events/x.json", "../x", ""):
        with pytest.raises(ValueError, match="view"):
            write_view(store, "demo", name, b"x")


@pytest.mark.parametrize("name", ["demo", "nightly-20260102T030405Z", "a.b_c", "x" * 100])
def test_ordinary_run_names_are_taken(name: str):
    assert validate_run_name(name) == name


@pytest.mark.parametrize("name", ["", "-x", ".x", "a b", "a/b", "ä", "x" * 101])
def test_run_names_that_cannot_be_folders_are_refused(local_store: Store, name: str):
    with pytest.raises(ValueError, match="run name"):
        create_run(local_store, name, CONFIG)
