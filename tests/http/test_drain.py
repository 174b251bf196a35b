"""The real service when it is told to stop: what runs is answered, and what waits for a slot is refused."""

import os
import signal
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from bodies import SHORT
from processes import LIMIT_S, needs_proc, wait_for
from replies import output, sentence
from server import ROOT, BareCog, CogServer

from musicgen_svc.errors import DrainingError

pytestmark = needs_proc


@pytest.fixture
def settings(weights: Path, temporary: Path) -> dict[str, str]:
    """Settings of the real service, with one slot and room for others to wait."""
    return {
        "COG_WEIGHTS": str(weights / "small"), "MUSICGEN_WEIGHTS_DIR": str(weights), "OMP_NUM_THREADS": "1",
        "TMPDIR": str(temporary), "MUSICGEN_SLOTS": "1", "COG_MAX_CONCURRENCY": "6",
        "MUSICGEN_DRAIN_GRACE_S": "600",
    }  # fmt: skip


def begin_one_and_let_three_wait(server: CogServer) -> list["Future[dict[str, Any]]"]:
    """Starts four requests for one slot. Returns when three of them wait."""

    def logs(words: str, id: str) -> None:
        wait_for(lambda: words in (server.state(id) or {"logs": ""})["logs"])

    answers = [server.submit(SHORT | {"duration": 60}, "running")]
    logs("generate", "running")
    for id in ("first", "second", "third"):
        answers.append(server.submit(SHORT, id))
        logs("before this one", id)
    return answers


def test_requests_that_wait_for_a_slot_are_told_to_go_elsewhere(settings: dict[str, str]) -> None:
    with CogServer(**settings) as server:
        running, *waiting = begin_one_and_let_three_wait(server)
        server.process.send_signal(signal.SIGTERM)
        for answer in waiting:
            assert sentence(answer.result(LIMIT_S)).endswith(str(DrainingError()))
        assert not running.done(), "the three did not wait for its end"
        assert len(output(running.result(LIMIT_S))) > 60 * 32_000
        assert server.process.wait(LIMIT_S) == 0


def test_in_an_image_the_hook_drains(settings: dict[str, str], temporary: Path) -> None:
    drain_file = temporary / "drain"
    drain_file.touch()  # left by the container before
    settings["MUSICGEN_DRAIN_FILE"] = str(drain_file)
    with BareCog(**settings) as server:
        running, *waiting = begin_one_and_let_three_wait(server)
        environment = os.environ | settings | {"PORT": server.url.rpartition(":")[2]}
        with subprocess.Popen(
            [sys.executable, "-m", "musicgen_svc.cli.drain"], cwd=ROOT, env=environment
        ) as hook:
            for answer in waiting:
                assert sentence(answer.result(LIMIT_S)).endswith(str(DrainingError()))
            assert sentence(server.predict(SHORT)).endswith(str(DrainingError()))
            assert hook.poll() is None and not running.done()
            assert len(output(running.result(LIMIT_S))) > 60 * 32_000
            assert hook.wait(LIMIT_S) == 0
        assert server.stop() == 0
