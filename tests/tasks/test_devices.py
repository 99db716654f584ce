"""Devices: where bf16 is slow."""

import pytest

from tasks.devices import emulates_bf16


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
