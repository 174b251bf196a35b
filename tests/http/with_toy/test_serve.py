"""scripts/serve: what it accepts, what it prints, and that it leaves no process and no file."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import requests
from bodies import SHORT
from processes import LIMIT_S, needs_proc, processes_with, wait_for
from server import CogServer

from musicgen_svc.cli.prediction_folders import COG_FOLDER


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("model_version", model) for model in ("melody", "small", "medium", "large", "encode-decode")),
        *(("normalization_strategy", strategy) for strategy in ("loudness", "clip", "peak", "rms")),
        *(("output_format", suffix) for suffix in ("wav", "mp3")),
        ("duration", 8.0),
        ("duration", 599),
        ("seed", 4294967295),
        ("an_unknown_field", 1),
    ],
)
def test_cog_accepts_what_the_schema_allows(toy_server: CogServer, name: str, value: object) -> None:
    assert toy_server.predict({"prompt": "fine", name: value})["status"] == "succeeded"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_version", "huge"),
        ("prompt", True),
        ("prompt", None),  # a field may be left out, but an explicit null is refused
        ("duration", 0),
        ("duration", 601),
        ("duration", 8.5),
        ("duration", "8"),
        ("top_k", -1),
        ("top_p", 1.01),
        ("classifier_free_guidance", 21),
        ("seed", 2**32),
        ("seed", None),
    ],
)
def test_cog_refuses_what_the_schema_excludes(toy_server: CogServer, name: str, value: object) -> None:
    reply = toy_server.predict({"prompt": "fine", name: value})
    assert reply["code"] == 422
    assert reply["detail"][0]["loc"] == ["body", "input", name]


def test_the_console_has_words_and_not_coglets_json(toy_server: CogServer) -> None:
    toy_server.predict({"prompt": "refused"}, id="a-refusal")
    toy_server.predict({"prompt": "fine", "seed": 99}, id="a-success")
    refused = "[a-refusal] Prediction failed: prompt is 'refused'; it must be another.\n"
    wait_for(lambda: refused in toy_server.log and "[a-success] seed: 99\n" in toy_server.log)
    wait_for(lambda: "Ready after" in toy_server.log)
    assert "{" not in toy_server.log
    assert "\033" not in toy_server.log


def test_our_warnings_are_shown_and_third_parties_are_not(toy_server: CogServer) -> None:
    wait_for(lambda: "UserWarning: ours" in toy_server.log)
    assert "theirs" not in toy_server.log


def test_a_taken_port_is_one_sentence(checkout: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = subprocess.run(
            [sys.executable, "-P", "-m", "musicgen_svc.cli.serve"],
            env={**os.environ, "PYTHONPATH": str(checkout), "PORT": str(port)},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
    assert ended.returncode == 1
    assert ended.stderr == (
        f"Port {port} on 127.0.0.1 is taken: stop what listens there, or choose another by PORT=...\n"
    )


def test_paths_are_relative_to_the_user_and_not_to_the_checkout(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with CogServer(root=checkout, cwd=tmp_path, COG_WEIGHTS="mine") as server:
        wait_for(lambda: f"weights: {tmp_path / 'mine'}\n" in server.log)


@needs_proc
def test_nothing_stays_behind_when_stopped_during_a_request(checkout: Path, tmp_path: Path) -> None:
    with CogServer(root=checkout, TMPDIR=str(tmp_path)) as server:
        clip = "data:audio/wav;base64,UklGRg=="
        answer = server.submit({"prompt": "slow", "input_audio": clip}, id="slow-request")
        wait_for(lambda: list(tmp_path.rglob("half-written")))
        assert len(processes_with(str(tmp_path))) >= 5  # ours, the reaper, Cog, the worker and its child
        assert server.stop() == 0
        assert processes_with(str(tmp_path)) == []
        assert list(tmp_path.iterdir()) == []
        assert not (COG_FOLDER / "slow-request").exists()
        with pytest.raises(requests.ConnectionError):
            answer.result(timeout=LIMIT_S)


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_does_not_wait_for_running_predictions(
    checkout: Path, tmp_path: Path, number: signal.Signals
) -> None:
    with CogServer(root=checkout, TMPDIR=str(tmp_path), MUSICGEN_DRAIN_GRACE_S="600") as server:
        server.submit({"prompt": "slow"}, id="impatient")
        wait_for(lambda: list(tmp_path.rglob("half-written")))
        server.process.send_signal(number)
        wait_for(lambda: "Stopping" in server.log)
        server.process.send_signal(number)
        assert server.process.wait(LIMIT_S) == 0
        assert processes_with(str(tmp_path)) == []


@needs_proc
def test_it_stops_when_whoever_started_it_is_gone(checkout: Path, tmp_path: Path) -> None:
    with CogServer(root=checkout, TMPDIR=str(tmp_path)) as server:
        assert server.process.stdin
        server.process.stdin.close()
        assert server.process.wait(LIMIT_S) == 0
        assert processes_with(str(tmp_path)) == []
        assert list(tmp_path.iterdir()) == []


def test_two_servers_at_once_do_not_disturb_each_other(checkout: Path, toy_server: CogServer) -> None:
    with CogServer(root=checkout) as second:
        assert second.url != toy_server.url
        assert second.predict({"prompt": "second"})["status"] == "succeeded"
    assert toy_server.predict({"prompt": "first"})["status"] == "succeeded"


def test_a_server_that_hangs_is_shown_thread_by_thread_and_stopped(checkout: Path) -> None:
    """What the harness of these tests does for whoever reads their log."""
    with CogServer(root=checkout) as server:
        server.answer_s = 1.0
        with pytest.raises(
            AssertionError, match=r'(?s)No answer to POST.*/service\.py", line \d+ in predict'
        ):
            server.predict({"prompt": "deadlock"})
        assert server.process.wait(LIMIT_S) == 0
        with pytest.raises(requests.ConnectionError):
            server.health()


def test_by_default_64_wait_and_the_next_is_refused(checkout: Path) -> None:
    held = {f"held-{n}": {"prompt": "a waltz", "duration": 600} for n in range(2 + 64)}
    with CogServer(root=checkout, COG_MAX_CONCURRENCY="", MUSICGEN_SLOTS="2") as server:
        futures = {id: server.submit(fields, id) for id, fields in held.items()}
        assert server.request("POST", "/predictions", {"input": SHORT}).status_code == 409
        assert {server.cancel(id) for id in held} == {200}
        assert {future.result(timeout=LIMIT_S)["status"] for future in futures.values()} == {"canceled"}
        wait_for(lambda: server.health()["status"] != "BUSY")
        assert server.predict(SHORT)["status"] == "succeeded"
