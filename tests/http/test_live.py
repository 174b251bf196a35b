"""Live audio over the real server: a client hears its request while it is generated, and no other notices."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
from bodies import LONG, SHORT
from events import Event, audio, chunks, events
from processes import LIMIT_S, wait_for
from receiver import receiver
from replies import clip, output, samples
from server import ROOT, CogServer, Json

from musicgen_svc.models.encodec_stream import PIECE_FRAMES

TEXT: dict[str, Any] = {"prompt": "a waltz", "duration": 8, "seed": 1}
REQUESTS: dict[str, dict[str, Any]] = {
    "text": TEXT,
    "two windows": TEXT | {"duration": 32, "output_format": "mp3"},
    "continuation": {"duration": 3, "seed": 2, "input_audio": clip(2), "continuation": True},
    "melody": {"prompt": "jazz", "duration": 5, "seed": 3, "input_audio": clip(2)},
}


def all_of(server: CogServer, values: Json, id: str | None = None, **more: Any) -> list[Event]:
    with events(server, values, id, **more) as seen:
        return list(seen)


@pytest.fixture(scope="module")
def alone(four: CogServer) -> dict[str, npt.NDArray[np.int16]]:
    """What a client of each request hears when it is alone."""
    return {name: audio(all_of(four, values)) for name, values in REQUESTS.items()}


@pytest.mark.parametrize("id", [None, "of-a-client"], ids=["POST", "PUT"])
def test_the_stream_has_the_audio_and_ends_with_the_reply_of_any_other_client(
    four: CogServer, id: str | None
) -> None:
    seen = all_of(four, TEXT, id)
    assert seen[0].name == "start" and seen[-1].name == "completed"
    reply, plain = seen[-1].data, four.predict(TEXT)
    assert output(reply) == output(plain)
    assert reply["metrics"].keys() == plain["metrics"].keys(), "no chunk stays in the metrics"
    heard, (written, rate) = audio(seen), samples(reply)
    assert heard.shape == written.T.shape
    assert {chunk["sample_rate"] for chunk in chunks(seen)} == {rate}
    assert np.corrcoef(heard[:, 0], written[0])[0, 1] > 0.95


def test_the_first_chunk_comes_while_the_request_runs(four: CogServer) -> None:
    with events(four, LONG, "long-live") as seen:
        first = next(event.chunk for event in seen if event.chunk)
        assert len(first["pcm"]) < 0.35 * first["sample_rate"] * 2 * 4 / 3
        assert (four.state("long-live") or {})["status"] == "processing"
        assert next(event.chunk for event in seen if event.chunk)["index"] == 1


def test_hanging_up_in_mid_stream_cancels_the_prediction_and_frees_its_slot(four: CogServer) -> None:
    leavers = [f"leaver-{index}" for index in range(5)]
    for id in leavers:
        with events(four, LONG, id) as seen:
            next(event for event in seen if event.chunk)
        wait_for(lambda id=id: four.state(id) is None)  # type: ignore[misc]
    for future in [four.submit(SHORT | {"seed": n}, f"after-{n}") for n in range(4)]:
        output(future.result(timeout=LIMIT_S))


def test_four_hear_their_own_audio_at_once(four: CogServer, alone: dict[str, npt.NDArray[np.int16]]) -> None:
    heard: dict[str, npt.NDArray[np.int16]] = {}

    def listen(name: str) -> None:
        heard[name] = audio(all_of(four, REQUESTS[name]))

    threads = [threading.Thread(target=listen, args=(name,)) for name in REQUESTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in REQUESTS:
        assert np.array_equal(heard[name], alone[name])


def test_a_slow_reader_loses_nothing_and_does_not_hold_up_the_request(
    four: CogServer, alone: dict[str, npt.NDArray[np.int16]]
) -> None:
    with events(four, REQUESTS["two windows"], "slow") as seen:
        read = [next(seen)]
        wait_for(lambda: four.state("slow") is None)  # it has ended, and the client has read one event
        read += seen
    assert read[-1].name == "completed"
    assert np.array_equal(audio(read), alone["two windows"])


def test_who_joins_a_running_prediction_hears_it_from_its_beginning(
    four: CogServer, alone: dict[str, npt.NDArray[np.int16]]
) -> None:
    with events(four, REQUESTS["two windows"], "joined") as seen:
        first = [next(seen) for _ in range(8)]
        with events(four, REQUESTS["two windows"], "joined") as later:
            assert np.array_equal(audio(list(later)), alone["two windows"])
        assert np.array_equal(audio([*first, *seen]), alone["two windows"])


def test_a_webhook_gets_what_it_gets_of_any_prediction(four: CogServer) -> None:
    with receiver() as hook:
        url = f"http://127.0.0.1:{hook.server_port}/hook"
        assert chunks(all_of(four, TEXT, webhook=url))
        received: list[Any] = hook.received  # type: ignore[attr-defined]
        wait_for(lambda: any(json.loads(body)["status"] == "succeeded" for *_, body in received))
    for *_, body in received:
        assert "audio" not in json.loads(body)["metrics"]
        assert b"pcm" not in body


@pytest.mark.parametrize("context", [{}, {"live": "0"}, {"live": "true"}])
def test_without_the_context_there_is_no_audio_in_the_stream(four: CogServer, context: Json) -> None:
    seen = all_of(four, SHORT, context=context)
    assert seen[-1].data["status"] == "succeeded"
    assert not any(event.name == "metric" and event.data["name"] == "audio" for event in seen)


def test_the_context_without_a_stream_changes_nothing_in_the_reply(four: CogServer) -> None:
    plain = four.predict(SHORT)
    reply = four.request("POST", "/predictions", {"input": SHORT, "context": {"live": "1"}}).json()
    assert output(reply) == output(plain)
    assert reply["metrics"].keys() == plain["metrics"].keys()


def test_a_request_that_fails_says_so_at_the_end_of_its_stream(four: CogServer) -> None:
    seen = all_of(four, SHORT | {"prompt": ""})
    assert seen[-1].name == "completed" and seen[-1].data["status"] == "failed"
    assert not chunks(seen)


def test_the_longest_audio_fits_what_cog_keeps_of_a_stream() -> None:
    """Cog keeps 1,024 events for those who read late, and a chunk is two: its metric, and its removal."""
    hop, longest_s, kept = 640, 15 * 60 + 600, 1024  # the longest clip, and as much music as may follow it
    frames = longest_s * 32_000 // hop
    pieces = len(PIECE_FRAMES) + -(-(frames - sum(PIECE_FRAMES)) // PIECE_FRAMES[-1])
    percents, positions, others = 101 + 10, 64, 40
    assert 2 * pieces + percents + positions + others < kept


def command(
    server: CogServer, cwd: Path, *arguments: str, **environment: str
) -> "subprocess.CompletedProcess[bytes]":
    """Runs `scripts/predict --live` against a server."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "musicgen_svc.cli.predict", "--live", "--url", server.url, *arguments],
        cwd=cwd, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment, capture_output=True,
        timeout=LIMIT_S,
    )  # fmt: skip


INPUTS = ("-i", "prompt=a waltz", "-i", "duration=8", "-i", "seed=1")


def test_the_command_line_writes_a_wav_that_grows_and_then_the_file(
    four: CogServer, tmp_path: Path, alone: dict[str, npt.NDArray[np.int16]]
) -> None:
    done = command(four, tmp_path, *INPUTS, "-o", "-")
    assert done.returncode == 0, done.stderr
    heard, rate = soundfile.read(io.BytesIO(done.stdout), dtype="int16", always_2d=True)
    assert rate == 32_000 and np.array_equal(heard, alone["text"])
    assert (tmp_path / "output.wav").read_bytes() == output(four.predict(TEXT))
    assert b"output.wav\n  8.00 s of audio, seed 1" in done.stderr


def test_the_command_line_plays_and_writes_the_file(four: CogServer, tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "ffplay").write_text("#!/bin/sh\nexec cat > played\n")
    (programs / "ffplay").chmod(0o755)
    done = command(
        four, tmp_path, *INPUTS, "-o", "waltz.wav", PATH=f"{programs}{os.pathsep}{os.environ['PATH']}"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"waltz.wav\n")
    assert (tmp_path / "waltz.wav").read_bytes() == output(four.predict(TEXT))
    assert len((tmp_path / "played").read_bytes()) == 44 + 8 * 32_000 * 2


def test_without_a_player_the_command_line_says_so_before_it_starts_anything(
    four: CogServer, tmp_path: Path
) -> None:
    done = command(four, tmp_path, *INPUTS, PATH=str(tmp_path))
    assert done.returncode == 2 and b"needs ffplay, aplay or afplay" in done.stderr


def test_an_interrupted_command_cancels_its_prediction(four: CogServer, tmp_path: Path) -> None:
    before = four.log.count("Prediction cancelled")
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "musicgen_svc.cli.predict", "--live", "--url", four.url, "-o", "-",
         "-i", "prompt=a waltz", "-i", "duration=600"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout and process.stdout.read(44)[:4] == b"RIFF"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130 and b"may still run" not in err
    wait_for(lambda: four.log.count("Prediction cancelled") > before)
    assert not list(tmp_path.iterdir())
