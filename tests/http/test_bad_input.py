"""Bad input: each row is answered as expected, and after it the service answers a good request.

A row expects a success, or one sentence with certain words. test_serve.py has values that Cog itself refuses.
"""

import http.server
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from processes import LIMIT_S, wait_for
from replies import clip, data_uri, output, sentence
from server import CogServer
from sounds import encode, noise, png, tone, wav_that_lies, wav_without_samples, written

FINE = "fine"


@dataclass(frozen=True)
class Row:
    """One request and its expected answer."""

    name: str
    fields: dict[str, Any]
    expected: str | list[str]
    """FINE, or words of the error."""


def text(**fields: Any) -> dict[str, Any]:
    """A request with a prompt."""
    return {"prompt": "a waltz", "duration": 1} | fields


def audio(content: bytes, **fields: Any) -> dict[str, Any]:
    """A request that sends a file through the codec."""
    coded = {"model_version": "encode-decode", "input_audio": data_uri(content)}
    return coded | fields


def float_wav(value: float) -> bytes:
    """A wav file with one sample of this value."""
    samples = tone(440, 0.5, 32_000)
    samples[0, 100] = value
    return written(samples, 32_000, subtype="FLOAT")


ROWS = [
    Row("no prompt and no audio", {}, ["prompt", "input_audio"]),
    Row("empty prompt and no audio", {"prompt": ""}, ["prompt", "input_audio"]),
    Row("prompt too long", text(prompt="x" * 2001), ["prompt", "2001", "2000"]),
    Row("longest prompt", text(prompt="x " * 1000), FINE),
    Row("prompt with NUL, emoji and right-to-left text", text(prompt="a\x00b 🎵 שלום"), FINE),
    Row("continuation without audio", text(continuation=True), ["continuation", "input_audio"]),
    Row("melody for a text model", text(model_version="small", input_audio=clip(1)), ["'small'", "'melody'"]),
    Row("encode-decode without audio", text(model_version="encode-decode"), ["encode-decode", "input_audio"]),
    Row("start after end", audio(encode(tone(440, 4, 8000), 8000, "wav16"), continuation_start=3,
        continuation_end=2), ["continuation_start", "3 s", "2 s", "4.00 s"]),
    Row("start at end", audio(encode(tone(440, 4, 8000), 8000, "wav16"), continuation_start=2,
        continuation_end=2), ["continuation_start", "2 s", "4.00 s"]),
    Row("start past the end of the clip", audio(encode(tone(440, 2.5, 8000), 8000, "wav16"),
        continuation_start=3), ["continuation_start", "3 s", "2.5"]),
    Row("end past the end of the clip", audio(encode(tone(440, 1, 8000), 8000, "wav16"),
        continuation_end=90), FINE),
    Row("a text file", audio(b"dear diary, today I made no music at all\n" * 20), ["input_audio", "audio"]),
    Row("an empty file", audio(b""), ["input_audio"]),
    Row("a truncated mp3", audio(encode(tone(440, 3, 44_100), 44_100, "mp3")[:20_001]), FINE),
    Row("a png", audio(png()), ["input_audio"]),
    Row("a wav without samples", audio(wav_without_samples()), ["input_audio", "no samples"]),
    Row("a wav whose header lies", audio(wav_that_lies(tone(440, 1, 44_100), 44_100, 2**31 - 1)), FINE),
    Row("a float wav with NaN", audio(float_wav(float("nan"))), ["input_audio", "finite"]),
    Row("a float wav with infinity", audio(float_wav(float("inf"))), ["input_audio", "finite"]),
    Row("20 minutes", audio(encode(np.zeros((1, 20 * 60 * 8000), np.float32), 8000, "flac")),
        ["input_audio", "15 minutes"]),
    Row("bad base64", text(input_audio="data:audio/wav;base64,%%%"), ["nput"]),
    Row("a path on the server", text(input_audio="/etc/hostname"), ["input_audio", "/etc/hostname", "URL"]),
    Row("another scheme", text(input_audio="file:///etc/hostname"), ["input_audio", "URL"]),
    Row("a playlist of other files", audio(b"#EXTM3U\n#EXTINF:1,\n/etc/hostname\n"), ["input_audio"]),
    Row("huge top_k", text(top_k=100_000), FINE),
    Row("top_p 1", text(top_p=1), FINE),
    Row("temperature 0", text(temperature=0), FINE),
    Row("tiny temperature", text(temperature=1e-6), FINE),
    Row("temperature 10", text(temperature=10), FINE),
    Row("no guidance", text(classifier_free_guidance=0), FINE),
    Row("most guidance", text(classifier_free_guidance=20), FINE),
    Row("a whole float", text(duration=1.0), FINE),
    Row("unknown fields", text(nonsense=1, lyrics="la"), FINE),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_bad_input_is_answered_and_the_next_request_works(server: CogServer, row: Row) -> None:
    check(server, row.fields, row.expected)
    output(server.predict(text(seed=1)))


def check(server: CogServer, fields: dict[str, Any], expected: str | list[str]) -> None:
    """Checks the answer to one request."""
    reply = server.predict(fields)
    if expected == FINE:
        output(reply)
    else:
        assert isinstance(expected, list)
        error = sentence(reply)
        assert all(word in error for word in expected), error
        assert "Traceback" not in error and "\n" not in error, error


class _Web(http.server.BaseHTTPRequestHandler):
    """Answers 404 for one path, and sends 200 MB for another."""

    def do_GET(self) -> None:
        if self.path == "/missing":
            self.send_error(404)
        elif self.path == "/large":
            self.send_response(200)
            self.end_headers()
            for _ in range(200):
                self.wfile.write(bytes(2**20))

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    """The URL of such a server."""
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Web)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.parametrize(("path", "words"), [("missing", ["404"]), ("large", ["input_audio", "100"])])
def test_urls_that_give_no_audio(server: CogServer, web: str, path: str, words: list[str]) -> None:
    check(server, text(input_audio=f"{web}/{path}"), words)
    output(server.predict(text(seed=1)))


def test_a_url_that_refuses_the_connection(server: CogServer) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    check(server, text(input_audio=f"http://127.0.0.1:{port}/clip.wav"), ["nput"])
    output(server.predict(text(seed=1)))


def test_a_url_that_hangs_can_be_cancelled(server: CogServer) -> None:
    """Cog fetches URLs itself, before `run()`, and has no time limit of its own for the body."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(LIMIT_S)
        fields = text(input_audio=f"http://127.0.0.1:{silent.getsockname()[1]}/clip.wav")
        hanging = server.submit(fields, "hangs")
        asking, _ = silent.accept()  # a cancel before this would cost Cog a thread and a slot
        assert server.cancel("hangs") == 200
        silent.close()
        asking.close()
        assert hanging.result(timeout=LIMIT_S)["status"] in ("canceled", "failed")
    output(server.predict(text(seed=1)))


def test_loud_noise_in_every_sampling_corner_stays_sound(server: CogServer) -> None:
    fields = audio(written(8 * noise(1, 32_000), 32_000, subtype="FLOAT"))
    for strategy in ("loudness", "peak", "rms", "clip"):
        output(server.predict(fields | {"normalization_strategy": strategy}))


def test_a_failure_s_traceback_is_in_the_server_s_log_and_not_in_the_prediction_s(server: CogServer) -> None:
    """A prediction's lines carry its id, and are part of what its client can ask for."""
    reply = server.predict(text(model_version="large"), id="absent")
    assert "'large' has no weights here" in sentence(reply)
    wait_for(
        lambda: re.search(r"\[absent\] failure \w{8}: ", server.log)
    )  # the reply may be faster than the log
    lines = server.log.splitlines()
    (number,) = [found[1] for line in lines if (found := re.search(r"\[absent\] failure (\w{8}): ", line))]
    (start,) = [index for index, line in enumerate(lines) if line.endswith(f" failure {number}:")]
    assert "[absent]" not in lines[start] and "Traceback" in lines[start + 1]
    assert not any("[absent]" in line and ("File " in line or "Traceback" in line) for line in lines)
