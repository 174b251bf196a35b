"""scripts/serve: Cog's server with a readable console, of which nothing stays behind."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import toy
from server import CogServer
from toy import needs_proc, processes_with, wait_for


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="module")
def server(checkout: Path) -> Iterator[CogServer]:
    with CogServer(root=checkout) as running:
        yield running


def test_requests_are_checked_against_the_schema(server: CogServer) -> None:
    reply = server.predict({"duration": 601})
    assert reply["code"] == 422
    assert reply["detail"][0]["loc"] == ["body", "input", "duration"]
    assert server.predict({"prompt": "fine", "duration": 599})["status"] == "succeeded"


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        *(("model_version", model, 200) for model in ("melody", "small", "medium", "large", "encode-decode")),
        *(("normalization_strategy", strategy, 200) for strategy in ("loudness", "clip", "peak", "rms")),
        *(("output_format", suffix, 200) for suffix in ("wav", "mp3")),
        ("duration", 8.0, 200),
        ("seed", 4294967295, 200),
        ("an_unknown_field", 1, 200),
        ("model_version", "huge", 422),
        ("seed", 4294967296, 422),
        ("prompt", None, 422),
        ("prompt", True, 422),
        ("duration", 8.5, 422),
    ],
)
def test_coglet_reads_the_schema_as_it_is_meant(
    server: CogServer, name: str, value: object, code: int
) -> None:
    assert server.predict({"prompt": "x", name: value})["code"] == code


def test_the_console_has_words_and_not_coglets_json(server: CogServer) -> None:
    server.predict({"prompt": "refused"}, id="a-refusal")
    server.predict({"prompt": "fine", "seed": 99}, id="a-success")
    refused = "[a-refusal] Prediction failed: prompt is 'refused'; it must be another.\n"
    wait_for(lambda: refused in server.log and "[a-success] seed: 99\n" in server.log)
    wait_for(lambda: "Ready after" in server.log)
    assert "{" not in server.log
    assert "\033" not in server.log


def test_our_warnings_are_shown_and_third_parties_are_not(server: CogServer) -> None:
    wait_for(lambda: "UserWarning: ours" in server.log)
    assert "theirs" not in server.log


def test_a_taken_port_is_one_sentence(checkout: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = subprocess.run(
            [sys.executable, "-m", "musicgen_svc.cli.serve"],
            env={**os.environ, "PYTHONPATH": str(checkout), "PORT": str(port)},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert ended.returncode == 1
    assert ended.stderr == (
        f"Port {port} on 127.0.0.1 is taken: stop what listens there, or choose another by PORT=...\n"
    )


def test_a_failed_set_up_says_why_and_the_server_stays_to_say_so(checkout: Path) -> None:
    with CogServer(root=checkout, COG_WEIGHTS="broken") as server:
        wait_for(lambda: "Setup failed: COG_WEIGHTS is 'broken', where there is no state_" in server.log)
        assert server.health()["status"] == "SETUP_FAILED"
        assert server.stop() == 0
        assert server.log.count("no state_dict.bin") == 1


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
        assert not Path("/tmp/coglet/predictions/slow-request").exists()
        with pytest.raises(requests.ConnectionError):
            answer.result(timeout=30)


@needs_proc
def test_ctrl_c_twice_does_not_wait_for_open_requests(tmp_path: Path) -> None:
    checkout = toy.checkout(tmp_path / "checkout", OPEN_REQUESTS_S=600)
    (tmp_path / "temporary").mkdir()
    with CogServer(root=checkout, TMPDIR=str(tmp_path / "temporary")) as server:
        server.submit({"prompt": "slow"}, id="impatient")
        wait_for(lambda: list(tmp_path.rglob("half-written")))
        server.process.send_signal(signal.SIGINT)
        wait_for(lambda: "Stopping" in server.log)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) == 0
        assert processes_with(str(tmp_path)) == []


@needs_proc
def test_it_stops_when_whoever_started_it_is_gone(checkout: Path, tmp_path: Path) -> None:
    with CogServer(root=checkout, TMPDIR=str(tmp_path)) as server:
        assert server.process.stdin
        server.process.stdin.close()
        assert server.process.wait(60) == 0
        assert processes_with(str(tmp_path)) == []
        assert list(tmp_path.iterdir()) == []


def test_two_servers_at_once_do_not_disturb_each_other(checkout: Path, server: CogServer) -> None:
    with CogServer(root=checkout) as second:
        assert second.url != server.url
        assert second.predict({"prompt": "second"})["status"] == "succeeded"
    assert server.predict({"prompt": "first"})["status"] == "succeeded"


def test_a_server_that_hangs_is_shown_thread_by_thread_and_stopped(checkout: Path) -> None:
    """What the harness of these tests does for whoever reads their log."""
    with CogServer(root=checkout) as server:
        server.answer_s = 1.0
        with pytest.raises(
            AssertionError, match=r'(?s)No answer to POST.*/service\.py", line \d+ in predict'
        ):
            server.predict({"prompt": "deadlock"})
        assert server.process.wait(60) == 0
        with pytest.raises(requests.ConnectionError):
            server.health()
