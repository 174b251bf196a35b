"""The life of a server: cancel, limits, a full disk or memory, files that are removed, and the end."""

import contextlib
import json
import os
import resource
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from bodies import LONG, SHORT
from processes import LIMIT_S, cpu_s, needs_proc, variable, wait_for, worker
from replies import clip, data_uri, output, percentages, sentence
from server import CogServer, descendants
from sounds import encode, tone

pytestmark = needs_proc


def check_that_it_idles(pid: int) -> None:
    """Checks that a process is idle soon. A request such as LONG would need CPU time for a minute or more."""
    deadline = time.monotonic() + 60
    while True:
        before = cpu_s(pid)
        time.sleep(0.5)
        if cpu_s(pid) - before < 0.05:
            return
        assert time.monotonic() < deadline, "the process still works on the request"


def temporary_folder(server: CogServer) -> Path:
    """The worker's folder for temporary files, which has all inputs and outputs."""
    return Path(variable(worker(server), "TMPDIR"))


def files_of(server: CogServer) -> list[str]:
    """The service's outputs, finished or not, in that folder. Inputs are written by Cog."""
    return [str(path) for path in temporary_folder(server).glob("musicgen-*/*/*")]


@contextmanager
def limited(pid: int, what: int, soft: int) -> Iterator[None]:
    """Context manager: changes a limit of a running process."""
    before = resource.prlimit(pid, what)
    resource.prlimit(pid, what, (soft, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, what, before)


@pytest.mark.parametrize(
    ("fields", "stage"),
    [
        (LONG, "generate"),
        (LONG | {"input_audio": clip(40)}, "condition"),
        (LONG | {"input_audio": clip(40), "continuation": True, "model_version": "small"}, "generate"),
        (
            {
                "input_audio": clip(14 * 60, rate=8000),
                "model_version": "encode-decode",
                "multi_band_diffusion": True,
            },
            "condition",
        ),
    ],
    ids=["text", "melody", "continuation", "encode-decode with diffusion"],
)
def test_a_cancelled_request_leaves_the_device_idle(
    server: CogServer, fields: dict[str, Any], stage: str
) -> None:
    id = f"cancel-{time.monotonic_ns()}"
    future = server.submit(fields, id)
    wait_for(lambda: stage in (server.state(id) or {"logs": ""})["logs"])
    assert server.cancel(id) == 200
    assert future.result(timeout=LIMIT_S)["status"] == "canceled"
    check_that_it_idles(worker(server))
    output(server.predict(SHORT))


def test_a_client_that_hangs_up_cancels(server: CogServer) -> None:
    body = json.dumps({"input": LONG})
    host, port = server.url.removeprefix("http://").split(":")
    wait_for(lambda: server.health()["status"] == "READY")  # Cog frees a place an instant after its answer
    with socket.create_connection((host, int(port))) as client:
        head = f"POST /predictions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json"
        shown = server.log.count("%|")
        client.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        wait_for(lambda: server.log.count("%|") > shown + 1)
        assert server.health()["status"] == "BUSY"
    wait_for(lambda: server.health()["status"] == "READY")
    check_that_it_idles(worker(server))
    output(server.predict(SHORT))


def test_a_request_beyond_the_places_is_refused_with_409(server: CogServer) -> None:
    running = server.submit(LONG, "the-only-place")
    assert server.health()["status"] == "BUSY"
    assert server.request("POST", "/predictions", {"input": SHORT}).status_code == 409
    assert server.cancel("the-only-place") == 200
    assert running.result(timeout=LIMIT_S)["status"] == "canceled"
    output(server.predict(SHORT))


def test_progress_is_one_bar_that_never_goes_back(server: CogServer) -> None:
    for fields in (
        SHORT,
        SHORT | {"duration": 2, "model_version": "small", "input_audio": clip(29), "continuation": True},
        SHORT | {"input_audio": clip(2)},
    ):
        reply = server.predict(fields)
        seen = percentages(reply["logs"])
        assert seen == sorted(seen) and seen[0] == 0 and seen[-1] == 100, seen
        assert len(set(seen)) >= 4


def test_metrics_tell_seed_length_steps_and_the_time_of_each_stage(server: CogServer) -> None:
    for fields in (SHORT, SHORT | {"input_audio": clip(2), "model_version": "encode-decode"}):
        metrics = server.predict(fields)["metrics"]
        stages = {"load", "condition", "generate", "decode", "write"}
        assert metrics.keys() >= {"seed", "audio_seconds", "steps"} | stages
        assert sum(metrics[stage] for stage in stages) <= metrics["predict_time"] + 0.05
    assert server.predict(SHORT)["metrics"]["steps"] >= 50


def test_outputs_go_after_their_grace(server: CogServer) -> None:
    wait_for(lambda: not files_of(server))
    for _ in range(3):
        output(server.predict(SHORT | {"input_audio": clip(1)}))
    assert len(files_of(server)) <= 3
    wait_for(lambda: not files_of(server))


def test_the_log_holds_the_cause_and_the_reply_the_sentence(server: CogServer) -> None:
    reply = server.predict(
        {"model_version": "encode-decode", "input_audio": data_uri(b"not audio at all" * 9)}
    )
    assert "Traceback" not in sentence(reply)
    wait_for(lambda: "av.error" in server.log and "Traceback" in server.log)


def test_a_full_disk_fails_the_request_and_not_the_service(server: CogServer) -> None:
    wait_for(lambda: not files_of(server))
    for format in ("wav", "mp3"):
        fields = SHORT | {"duration": 4, "temperature": 0, "output_format": format, "model_version": "small"}
        with limited(worker(server), resource.RLIMIT_FSIZE, 100_000):
            error = sentence(server.predict(fields))
        assert "disk" in error or "space" in error or "written" in error, error
        assert files_of(server) == []
    output(server.predict(SHORT))


def test_out_of_memory_fails_the_request_and_not_the_service(server: CogServer) -> None:
    output(server.predict(SHORT | {"model_version": "small"}))
    pid = worker(server)
    used = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    fields = {
        "input_audio": data_uri(encode(tone(440, 890, 8000), 8000, "opus")),
        "model_version": "encode-decode",
    }
    with limited(pid, resource.RLIMIT_AS, used + 150 * 2**20):  # a thread of Cog's takes 72 MB of it
        error = sentence(server.predict(fields))
    assert "memory" in error, error
    output(server.predict(SHORT))
    wait_for(lambda: server.health()["status"] == "READY")


@pytest.fixture(scope="module")
def poor(weights: Path) -> Iterator[CogServer]:
    """A server with low limits for time and duration, one slot, room for two to wait, and without ffmpeg."""
    with CogServer(
        COG_WEIGHTS=str(weights / "small"), MUSICGEN_WEIGHTS_DIR=str(weights), OMP_NUM_THREADS="1",
        COG_MAX_CONCURRENCY="3", MUSICGEN_SLOTS="1",
        MUSICGEN_MAX_REQUEST_S="5", MUSICGEN_MAX_DURATION_S="500", PATH="/nowhere",
        IMAGEIO_FFMPEG_EXE="/nowhere/ffmpeg",
    ) as running:  # fmt: skip
        yield running


def test_a_request_has_a_time_limit(poor: CogServer) -> None:
    error = sentence(poor.predict(LONG | {"duration": 500}))
    assert "5 s" in error and "MUSICGEN_MAX_REQUEST_S" in error
    output(poor.predict(SHORT))


def test_a_waiting_request_is_cancelled_at_once_and_not_timed(poor: CogServer) -> None:
    """Its time limit counts from the moment when it gets a slot."""
    long = LONG | {"duration": 500}
    expected = output(poor.predict(SHORT))
    first = poor.submit(long, "first")
    wait_for(lambda: "generate" in (poor.state("first") or {"logs": ""})["logs"])
    kept, left = poor.submit(SHORT, "kept"), poor.submit(SHORT, "left")
    wait_for(lambda: "queue (1 before this one)" in poor.log)
    assert poor.cancel("left") == 200
    assert left.result(timeout=LIMIT_S)["status"] == "canceled"
    assert not first.done() or "longer than the limit" in sentence(first.result())
    assert "longer than the limit of 5 s" in sentence(first.result(timeout=LIMIT_S))
    assert output(kept.result(timeout=LIMIT_S)) == expected
    # Absent models and wrong inputs are refused before the wait.
    again = poor.submit(long, "again")
    wait_for(lambda: "generate" in (poor.state("again") or {"logs": ""})["logs"])
    refused = poor.predict(SHORT | {"model_version": "large"})
    assert "large" in sentence(refused) and not again.done()
    assert poor.cancel("again") == 200


def test_the_operator_sets_the_longest_duration(poor: CogServer) -> None:
    assert "between 1 and 500" in sentence(poor.predict(LONG | {"duration": 501}))


def test_without_ffmpeg_wav_works_and_mp3_says_why_not(poor: CogServer) -> None:
    assert "ffmpeg" in sentence(poor.predict(SHORT | {"output_format": "mp3"}))
    output(poor.predict(SHORT))


def test_sigterm_during_a_request_leaves_no_process_and_no_file(poor: CogServer) -> None:
    """This test ends the server `poor`, and must be the last one that uses it."""
    output(poor.predict(SHORT))
    pids, folder = [*descendants(poor.process.pid), poor.process.pid], temporary_folder(poor)
    future = poor.submit(SHORT | {"duration": 400}, "open")
    poor.process.send_signal(signal.SIGTERM)
    poor.process.wait(timeout=LIMIT_S)
    with contextlib.suppress(requests.ConnectionError):  # closed: just as good
        assert future.result(timeout=LIMIT_S)["status"] in ("canceled", "failed")
    assert not folder.exists()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids[:-1]))


def test_a_failed_set_up_says_what_is_missing_and_the_server_runs_until_it_is_stopped(
    tmp_path: Path,
) -> None:
    with CogServer(COG_WEIGHTS="nowhere", MUSICGEN_WEIGHTS_DIR=str(tmp_path)) as server:
        wait_for(lambda: "Setup failed: COG_WEIGHTS is 'nowhere'" in server.log)
        health = server.health()
        assert health["status"] == "SETUP_FAILED"
        assert "COG_WEIGHTS is 'nowhere'" in health["setup"]["logs"]
        assert server.stop() == 0
        assert server.log.count("COG_WEIGHTS is 'nowhere'") == 1
