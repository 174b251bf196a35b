"""The number of threads depends on the model and the machine, and on nothing that ran before."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from musicgen_svc.runtime import threads
from musicgen_svc.runtime.threads import SMALL_PARAMETERS, ComputeThreads, use_threads


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_default", lambda: 8)
    monkeypatch.setattr(threads, "cores", lambda: 6)


def test_a_small_model_computes_with_one_thread_and_a_large_one_with_all_cores() -> None:
    chosen = ComputeThreads(user_chose=False)
    assert chosen.for_model(SMALL_PARAMETERS - 1) == 1
    assert chosen.for_model(SMALL_PARAMETERS) == chosen.most == 6, "PyTorch's default may exceed the cores"


def test_the_users_own_number_holds_for_every_model() -> None:
    chosen = ComputeThreads(user_chose=True)
    assert chosen.for_model(1) == chosen.for_model(10**9) == chosen.most == 8


def test_a_number_can_be_fixed_for_every_later_model() -> None:
    chosen = ComputeThreads(user_chose=False)
    chosen.fix(2)
    assert chosen.for_model(1) == chosen.for_model(10**9) == chosen.most == 2


def test_the_default_is_pytorchs_own_whatever_was_set_since() -> None:
    code = """
import threading, torch
from musicgen_svc.runtime.threads import ComputeThreads
before = ComputeThreads(user_chose=True).most
torch.set_num_threads(before + 3)
seen = []
thread = threading.Thread(target=lambda: seen.append(ComputeThreads(user_chose=True).most))
thread.start(); thread.join()
assert seen == [before] and before == 2, (seen, before)
"""
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": "2"}, check=True)


def test_a_threads_own_number_is_not_changed_by_another_thread() -> None:
    """Each request sets the number on its own thread, and others set theirs while it computes."""
    before = torch.get_num_threads()
    seen: list[int] = []
    set_here, set_there = threading.Event(), threading.Event()

    def compute() -> None:
        use_threads(1)
        set_here.set()
        set_there.wait()
        seen.append(torch.get_num_threads())

    thread = threading.Thread(target=compute)
    thread.start()
    set_here.wait()
    assert torch.get_num_threads() == before
    torch.set_num_threads(3)
    set_there.set()
    thread.join()
    torch.set_num_threads(before)
    assert seen == [1]
