"""Freed memory goes back to the operating system, but not at every call."""

import sys
from types import SimpleNamespace

import pytest

from musicgen_svc.runtime import freed_memory
from musicgen_svc.runtime.freed_memory import INTERVAL_S, FreedMemory


def test_memory_is_given_back_once_an_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    now_s = 100.0
    monkeypatch.setattr(freed_memory.ctypes, "CDLL", lambda name: SimpleNamespace(malloc_trim=calls.append))
    monkeypatch.setattr(freed_memory, "time", SimpleNamespace(monotonic=lambda: now_s))
    memory = FreedMemory()
    memory.give_back()
    memory.give_back()
    assert calls == [0]
    now_s += INTERVAL_S
    memory.give_back()
    assert calls == [0, 0]


def test_a_library_without_the_function_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freed_memory.ctypes, "CDLL", lambda name: SimpleNamespace())
    FreedMemory().give_back()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_the_real_function_is_found() -> None:
    FreedMemory().give_back()
