"""Devices: where bf16 is slow, and how many cores a labeler has beside one."""

import os

import pytest

from tasks.devices import emulates_bf16, gpus_of_machine, threads_of_labeler


@pytest.mark.parametrize(
    ("text", "is_emulated"),
    [
        ("model name\t: AMD\nflags\t\t: fpu sse2 avx2\n", True),
        ("flags\t\t: fpu avx2 avx512f avx512_bf16\n", False),
        ("Features\t: fp asimd bf16\n", False),
        ("Features\t: fp asimd\n", True),
        ("processor\t: 0\n", False),
    ],
)
def test_a_cpu_without_instructions_for_bf16_emulates_it(tmp_path, text, is_emulated):
    (tmp_path / "cpuinfo").write_text(text)
    assert emulates_bf16("cpu", cpuinfo=tmp_path / "cpuinfo") is is_emulated


def test_a_cpu_that_does_not_say_what_it_has_is_trusted(tmp_path):
    assert not emulates_bf16("cpu", cpuinfo=tmp_path / "none")


def test_a_labeler_has_its_share_of_the_cores_beside_a_gpu_and_one_without(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    assert threads_of_labeler("cuda", 1) == 16
    assert threads_of_labeler("cuda", 5) == 3
    assert threads_of_labeler("cuda", 40) == 1
    assert threads_of_labeler("cpu", 1) == 1


def test_the_gpus_of_a_machine_are_those_that_its_driver_lists(tmp_path):
    assert gpus_of_machine(tmp_path / "none") == 1
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / name).mkdir()
    assert gpus_of_machine(tmp_path) == 2
