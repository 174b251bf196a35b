"""scripts/predict's side of the conversation, against a server that answers like Cog's."""

import base64
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator
from tqdm import tqdm

from musicgen_svc.cli import client as client_module
from musicgen_svc.cli import output as output_module
from musicgen_svc.cli import predict as predict_module
from musicgen_svc.cli.client import Client, FailedError, progress
from musicgen_svc.cli.cog_log import sentence
from musicgen_svc.cli.inputs import MAX_FILE_BYTES, UsageError, checked_url, request_input
from musicgen_svc.cli.schema_fields import described, impossible_input

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = json.loads((ROOT / "openapi_schema.json").read_text())
WAV = "data:audio/wav;base64," + base64.b64encode(b"RIFF....").decode()

Json = dict[str, Any]
Answer = tuple[int, Json]


class FakeCog(ThreadingHTTPServer):
    """Answers as coglet 0.23.1 was seen to; a test says what a prediction comes to."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FakeHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.statuses = ["READY"]  # of health-check, the last one again and again
        self.set_up_log = ""
        self.schema: Json | None = SCHEMA
        self.outcome: Callable[[str, Json], Answer] = lambda id, values: (
            200,
            {"status": "succeeded", "output": WAV},
        )
        self.running: dict[str, str] = {}  # id -> log so far
        self.started: list[Json] = []
        self.cancelled: list[str] = []
        self.ignored_cancels = 0  # so many are answered like all others, and do nothing


class FakeHandler(BaseHTTPRequestHandler):
    server: FakeCog

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        fake = self.server
        if self.path == "/health-check":
            status = fake.statuses.pop(0) if len(fake.statuses) > 1 else fake.statuses[0]
            self._answer(200, {"status": status, "setup": {"logs": fake.set_up_log}})
        elif self.path == "/openapi.json":
            self._answer(*((200, fake.schema) if fake.schema else (503, {"error": "no schema"})))
        elif self.path == "/uploaded/song.mp3":
            self._answer(200, b"ID3 uploaded", "audio/mpeg; charset=binary")
        else:
            self._answer(404, b"<html>", "text/html")

    def do_PUT(self) -> None:
        fake = self.server
        id = self.path.removeprefix("/predictions/")
        values = json.loads(self.rfile.read(int(self.headers["content-length"])))["input"]
        if id in fake.running:
            state = {"id": id, "input": values, "logs": fake.running[id], "status": "processing"}
            self._answer(202, state)
            return
        valid = Draft7Validator({"$ref": "#/components/schemas/Input", **SCHEMA}).is_valid(values)
        if fake.schema and not valid:
            problem = {
                "loc": ["body", "input", "duration"],
                "msg": "99999 is greater than the maximum of 600",
            }
            self._answer(422, {"detail": [{**problem, "type": "value_error"}]})
            return
        fake.started.append(values)
        self._answer(*fake.outcome(id, values))

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        if self.server.ignored_cancels:
            self.server.ignored_cancels -= 1
        else:
            self.server.cancelled.append(self.path.split("/")[2])
        self._answer(200, {})

    def _answer(self, code: int, body: Json | bytes, kind: str = "application/json") -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def cog() -> Iterator[FakeCog]:
    with FakeCog() as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def client(cog: FakeCog) -> Client:
    return Client(cog.url)


def predict(client: Client, on_progress: client_module.OnProgress = lambda percent, stage: None) -> Json:
    return client.predict({"prompt": "a waltz"}, SCHEMA, on_progress, on_busy=lambda: None)


def failure(answer: Answer) -> Callable[[str, Json], Answer]:
    return lambda id, values: answer


# Inputs


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        ("prompt=a slow waltz", "a slow waltz"),
        ("prompt=tempo=120", "tempo=120"),
        ('prompt="quoted"', "quoted"),
        ("prompt=", ""),
        ('prompt="@home"', "@home"),
        ("prompt=7", "7"),
        ("prompt=true", "true"),
        ("duration=30", 30),
        ("duration=8.0", 8.0),
        ("seed=-1", -1),
        ("seed=4294967295", 4294967295),
        ("top_p=0.5", 0.5),
        ("temperature=1", 1),
        ("continuation=true", True),
        ("continuation=False", False),
        ("output_format=mp3", "mp3"),
        ("input_audio=https://example.org/a.mp3", "https://example.org/a.mp3"),
        ("input_audio=HTTPS://example.org/A.mp3", "https://example.org/A.mp3"),
        ("input_audio=DATA:audio/wav;BASE64,UklGRg==", "data:audio/wav;base64,UklGRg=="),
    ],
)
def test_values_have_the_types_of_the_schema(pair: str, value: object) -> None:
    values = request_input([pair], SCHEMA)
    assert values == {pair.partition("=")[0]: value}
    assert type(next(iter(values.values()))) is type(value)


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (["a waltz"], "an input is written name=value"),
        (["=a waltz"], "an input is written name=value"),
        (["prompt=a", "prompt=b"], "prompt is given twice"),
        (["promt=a"], "There is no input 'promt'; there are model_version, prompt, input_audio, duration,"),
        (["input_audio=@nowhere.mp3"], "input_audio: cannot read nowhere.mp3: No such file or directory."),
        (["input_audio=@."], "input_audio: cannot read .: Is a directory."),
        (["input_audio=@/dev/null"], "input_audio: /dev/null is empty (0 bytes)"),
        (["input_audio=clip.wav"], "write input_audio=@clip.wav to send that file."),
        (["input_audio="], "write input_audio=@FILE."),
        (["input_audio=file:///etc/passwd"], "neither an http(s) URL nor a data URI"),
        (["input_audio=http://"], "it names no host."),
        (["input_audio=http://host:port/a.wav"], "its host or port cannot be read."),
        (["input_audio=data:audio/wav;base64,!!!!"], "whose base64 does not decode: write input_audio=@FILE"),
        (["input_audio=data:audio/wav;base64,"], "the data URI is empty (0 bytes)"),
        (["input_audio=data:audio/wav"], "a data URI without a comma"),
        (["duration=0"], "duration is '0'; it must be a whole number from 1 to 600."),
        (["duration=601"], "duration is '601'; it must be a whole number from 1 to 600."),
        (["duration=8.5"], "duration is '8.5'; it must be a whole number from 1 to 600."),
        (["duration="], "duration is ''; it must be a whole number from 1 to 600."),
        (["duration=long"], "duration is 'long'; it must be"),
        (["top_k=-1"], "top_k is '-1'; it must be a whole number, at least 0."),
        (["top_p=1.5"], "top_p is '1.5'; it must be a number from 0 to 1."),
        (["temperature=nan"], "temperature is 'nan'; it must be a number from 0 to 10."),
        (["temperature=inf"], "temperature is 'inf'; it must be"),
        (["continuation=1"], "continuation is '1'; it must be true or false."),
        (["output_format=flac"], "output_format is 'flac'; it must be one of wav, mp3."),
        (["output_format=@wav"], "output_format is '@wav'; it must be one of wav, mp3."),
        (["prompt=caf\udce9"], "prompt: the value is not UTF-8 text"),
        (["prompt=@nowhere.txt"], "to send text that begins with @, write prompt='\"@...\"'."),
    ],
)
def test_a_wrong_command_line_is_one_sentence(pairs: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)):
        request_input(pairs, SCHEMA)


def test_exactly_what_the_schema_refuses_is_refused_here() -> None:
    """The checker is our own, and judges words as `cog predict` would send them."""
    validator = Draft7Validator({"$ref": "#/components/schemas/Input", **SCHEMA})
    numbers = [-2, -1, 0, 1, 0.5, 1.5, 8, 8.0, 10, 11, 20, 21, 600, 601, 4294967295, 4294967296]
    for name in SCHEMA["components"]["schemas"]["Input"]["properties"].keys() - {"prompt", "input_audio"}:
        for text in [*map(str, numbers), "true", "false", "wav", "small", "rms", "word"]:
            sent: list[Any] = [text]
            with contextlib.suppress(ValueError):
                sent.append(json.loads(text))
            allowed = any(validator.is_valid({name: value}) for value in sent)
            assert accepted([f"{name}={text}"]) == allowed, (name, text)


def accepted(pairs: list[str]) -> bool:
    try:
        request_input(pairs, SCHEMA)
    except UsageError:
        return False
    return True


def test_a_prompt_is_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("a slow\nwaltz – très doux\n", encoding="utf-8")
    pairs = [f"prompt=@{tmp_path}/words.txt"]
    assert request_input(pairs, SCHEMA) == {"prompt": "a slow\nwaltz – très doux"}
    (tmp_path / "words.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UsageError, match=r"words\.txt is not a UTF-8 text file"):
        request_input(pairs, SCHEMA)


def test_a_file_that_no_server_takes_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "long.wav").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(UsageError, match=r"long\.wav has 78\.6 MB or more; Cog takes 78\.6 MB in a request"):
        request_input([f"input_audio=@{tmp_path}/long.wav"], SCHEMA)


def test_a_required_input_is_asked_for() -> None:
    schema = {"components": {"schemas": {"Input": {"properties": {"text": {}}, "required": ["text"]}}}}
    with pytest.raises(UsageError, match="The input text is missing: give it as -i text=VALUE"):
        request_input([], schema)
    assert request_input(["text=a"], schema) == {"text": "a"}


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("127.0.0.1:5791", "write http://127.0.0.1:5791"),
        ("gpu-box", "write http://gpu-box"),
        ("ftp://gpu-box", "the scheme is 'ftp'; write http://gpu-box"),
        ("http://", "it names no host"),
        ("http://gpu-box:many", "its host or port cannot be read"),
        ("http://[::1", "its host or port cannot be read"),
        ("http://gpu box", "it holds spaces"),
        ("", "begins with its scheme"),
    ],
)
def test_a_wrong_url_of_a_server_is_one_sentence(url: str, words: str) -> None:
    with pytest.raises(UsageError, match=r"^--url .*" + re.escape(words)):
        checked_url(url)
    assert checked_url("HTTP://gpu-box:5000/path") == "HTTP://gpu-box:5000/path"


def test_every_input_is_described_with_what_it_accepts() -> None:
    text = described(SCHEMA)
    assert "  duration: a whole number from 1 to 600; default 8\n" in text
    assert "  output_format: one of wav, mp3; default wav\n" in text
    assert "  continuation: true or false; default false\n" in text
    for name in SCHEMA["components"]["schemas"]["Input"]["properties"]:
        assert f"\n  {name}: " in f"\n{text}"


@pytest.mark.parametrize(
    ("name", "kind"),
    [("clip.mp3", "audio/mpeg"), ("clip.flac", "audio/"), ("clip", "application/octet-stream")],
)
@pytest.mark.parametrize("schema", [SCHEMA, None])
def test_an_at_sign_sends_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str, schema: Json | None
) -> None:
    content = bytes(range(256))
    (tmp_path / name).write_bytes(content)
    monkeypatch.setenv("HOME", str(tmp_path))
    head, _, data = request_input([f"input_audio=@~/{name}"], schema)["input_audio"].partition(",")
    assert head.startswith(f"data:{kind}")
    assert head.endswith(";base64")
    assert base64.b64decode(data) == content


def test_the_question_for_progress_can_never_be_a_request() -> None:
    question = impossible_input(SCHEMA)
    assert question is not None
    assert not Draft7Validator({"$ref": "#/components/schemas/Input", **SCHEMA}).is_valid(question)
    assert impossible_input(None) is None


# Answers


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("Prediction failed: Async prediction failed: InputError: seed is -2; no.", "seed is -2; no."),
        ("Prediction failed: Prediction failed: ValueError: a b", "a b"),
        ("Prediction failed: Input validation error: 404 for url", "Input validation error: 404 for url"),
        (
            "worker setup failed: worker setup failed (slot 4585da5b-c6d8-4d52-9d9a-6313350bbf16): "
            "Setup failed: setup failed: WeightsError: COG_WEIGHTS is 'x', where there is nothing.",
            "COG_WEIGHTS is 'x', where there is nothing.",
        ),
        (
            "Traceback ...\n  File\nmusicgen_svc.errors.AudioError: input_audio is no audio.\n",
            "input_audio is no audio.",
        ),
        ("KeyError: 'x'", "KeyError: 'x'"),
        ("Worker crashed", "Worker crashed"),
        ("", "no reason was given."),
    ],
)
def test_an_error_is_cut_down_to_the_services_sentence(error: str, words: str) -> None:
    assert sentence(error) == words


def test_progress_is_the_last_bar_that_tqdm_printed() -> None:
    log = io.StringIO()
    bar = tqdm(
        total=100, file=log, mininterval=0, bar_format="{percentage:3.0f}%|{bar:25}| {desc} [{elapsed}]"
    )
    for stage, percent in [("load", 5), ("encode-decode", 42)]:
        bar.set_description_str(stage)
        bar.update(percent - bar.n)
    assert progress(log.getvalue()) == (42, "encode-decode")
    bar.update(58)
    bar.close()
    assert progress(log.getvalue() + "a line that ends in 3%\n") == (100, "encode-decode")
    assert progress("seed: 5\n") == (0, "")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            (200, {"status": "failed", "error": "Prediction failed: InputError: prompt is bad; no."}),
            "prompt is bad; no.",
        ),
        ((200, {"status": "canceled"}), "The prediction was cancelled."),
        ((200, {"status": "succeeded", "output": None}), "The prediction succeeded and returned no file."),
        ((503, {"error": "Setup has not finished yet.", "status": "failed"}), "Setup has not finished yet."),
        ((413, {"error": "length limit exceeded"}), "The request is larger than the server takes"),
        ((500, {}), "The server answered 500."),
    ],
)
def test_a_prediction_that_fails_is_one_sentence(
    cog: FakeCog, client: Client, answer: Answer, words: str
) -> None:
    cog.outcome = failure(answer)
    with pytest.raises(FailedError) as caught:
        predict(client)
    assert str(caught.value).startswith(words)


def test_what_the_schema_refuses_is_one_sentence_with_the_field(client: Client) -> None:
    with pytest.raises(FailedError, match=r"^duration: 99999 is greater than the maximum of 600\.$"):
        client.predict({"duration": 99999}, SCHEMA, lambda percent, stage: None, lambda: None)


def test_nobody_there_and_somebody_else_are_sentences(cog: FakeCog) -> None:
    with pytest.raises(FailedError, match=r"^What answers|^The server answered 404 Not Found without JSON"):
        Client(f"{cog.url}/elsewhere").health()
    cog.server_close()
    with pytest.raises(
        FailedError, match=r"^The server at http://127.0.0.1:1 does not answer: Connection refused\.$"
    ):
        Client("http://127.0.0.1:1").health()


def test_a_proxy_is_not_asked_for_the_loopback(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "")
    assert client.health()["status"] == "READY"


# Waiting


def test_set_up_is_waited_for(cog: FakeCog, client: Client) -> None:
    cog.statuses = ["STARTING", "STARTING", "READY"]
    waits: list[None] = []
    client.await_ready(lambda: waits.append(None))
    assert len(waits) == 2


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("SETUP_FAILED", r"^Setup failed: the weights are gone\.$"),
        ("DEFUNCT", "says that it is DEFUNCT"),
        ("UNHEALTHY", "says that it is UNHEALTHY"),
    ],
)
def test_a_server_that_will_never_be_ready_is_not_waited_for(
    cog: FakeCog, client: Client, status: str, words: str
) -> None:
    cog.statuses = ["STARTING", status]
    cog.set_up_log = "worker setup failed: WeightsError: the weights are gone."
    with pytest.raises(FailedError, match=words):
        client.await_ready()


def test_a_busy_server_is_asked_again_ever_less_often(
    cog: FakeCog, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(client_module.time, "sleep", slept.append)
    cog.outcome = lambda id, values: (
        (409, {"error": "At capacity"})
        if len(cog.started) <= 6
        else (200, {"status": "succeeded", "output": WAV})
    )
    told: list[None] = []
    reply = client.predict({}, SCHEMA, lambda percent, stage: None, lambda: told.append(None))
    assert reply["output"] == WAV
    assert slept == [1, 2, 4, 8, 15, 15]
    assert len(told) == 6


def test_a_server_without_a_worker_is_not_taken_for_busy(cog: FakeCog, client: Client) -> None:
    cog.outcome = failure((409, {"error": "At capacity"}))
    cog.statuses = ["UNHEALTHY"]
    with pytest.raises(FailedError, match="UNHEALTHY"):
        predict(client)


@pytest.fixture
def slow(cog: FakeCog, monkeypatch: pytest.MonkeyPatch) -> FakeCog:
    """A prediction that goes on until the test takes it out of `running`."""
    monkeypatch.setattr(client_module, "POLL_S", 0.01)

    def outcome(id: str, values: Json) -> Answer:
        cog.running[id] = " 10%|#         | condition [00:00<00:09]"
        while id in cog.running and id not in cog.cancelled:
            time.sleep(0.01)
        return 200, {"status": "succeeded", "output": WAV}

    cog.outcome = outcome
    return cog


def test_progress_is_told_while_the_prediction_runs(slow: FakeCog, client: Client) -> None:
    seen = []

    def on_progress(percent: int, stage: str) -> None:
        seen.append((percent, stage))
        for id in list(slow.running):
            if percent == 10:
                slow.running[id] += "\r 60%|######    | generate [00:06<00:04]"
            elif percent == 60:
                del slow.running[id]

    predict(client, on_progress)
    assert [step for step in dict.fromkeys(seen) if step[0]] == [(10, "condition"), (60, "generate")]
    assert slow.started == [{"prompt": "a waltz"}]  # asking started nothing


@pytest.mark.parametrize("ignored", [0, 3])
def test_an_interrupt_cancels_the_prediction(slow: FakeCog, client: Client, ignored: int) -> None:
    """Cog answers a cancel that comes as a prediction starts with 200, and the prediction runs on."""

    def interrupt(percent: int, stage: str) -> None:
        if percent:
            raise KeyboardInterrupt

    slow.ignored_cancels = ignored
    with pytest.raises(KeyboardInterrupt) as caught:
        predict(client, interrupt)
    assert set(slow.cancelled) == set(slow.running)
    assert slow.ignored_cancels == 0 and not hasattr(caught.value, "__notes__")


def test_a_cancel_that_is_never_heeded_is_given_up_and_told(
    slow: FakeCog, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "CANCEL_S", 0.05)
    slow.ignored_cancels = 10**6

    def interrupt(percent: int, stage: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        predict(client, interrupt)
    assert ["may still run" in note for note in caught.value.__notes__] == [True]
    slow.running.clear()


def test_a_server_without_a_schema_is_never_asked_for_progress(slow: FakeCog, client: Client) -> None:
    """It would check nothing, and take the question for a request."""
    seen = []

    def on_progress(percent: int, stage: str) -> None:
        seen.append(percent)
        if len(seen) == 5:
            slow.running.clear()

    client.predict({"prompt": "a waltz"}, None, on_progress, lambda: None)
    assert set(seen) == {0}
    assert slow.started == [{"prompt": "a waltz"}]


# The output


def test_the_suffix_is_that_of_what_came_back(cog: FakeCog) -> None:
    assert output_module.fetch(WAV) == (b"RIFF....", ".wav")
    assert output_module.fetch("data:audio/mpeg;base64,SUQz") == (b"ID3", ".mp3")
    assert output_module.fetch("data:audio/flac,a%20b") == (b"a b", ".flac")
    assert output_module.fetch(f"{cog.url}/uploaded/song.mp3") == (b"ID3 uploaded", ".mp3")


@pytest.mark.parametrize("output", ["data:audio/wav;base64,A", "/uploaded/gone.mp3", "ftp://example.org/x"])
def test_an_output_that_cannot_be_had_is_one_sentence(cog: FakeCog, output: str) -> None:
    with pytest.raises(FailedError, match="output"):
        output_module.fetch(cog.url + output if output.startswith("/") else output)


def test_without_a_name_no_file_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("output.wav").write_bytes(b"mine")
    saved = [str(output_module.save(b"new", ".wav", None)) for _ in range(2)]
    assert saved == ["output-1.wav", "output-2.wav"]
    assert str(output_module.save(b"new", ".mp3", None)) == "output.mp3"
    assert Path("output.wav").read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "output-1.wav", "output-2.wav", "output.mp3", "output.wav",
    ]  # fmt: skip


def test_a_named_file_is_replaced_at_once_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "song.wav"
    path.write_bytes(b"old")
    with monkeypatch.context() as broken:

        def full(self: Path, data: bytes) -> int:
            self.touch()
            raise OSError(28, "No space left on device", str(path))

        broken.setattr(Path, "write_bytes", full)
        with pytest.raises(FailedError, match="No space left on device"):
            output_module.save(b"new", ".wav", path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    output_module.save(b"new", ".wav", path)
    assert path.read_bytes() == b"new"


def test_a_link_is_followed_and_a_pipe_or_device_is_written_to(tmp_path: Path) -> None:
    """`-o /dev/null`, as root: it must be there afterwards."""
    target = tmp_path / "elsewhere" / "song.wav"
    target.parent.mkdir()
    target.write_bytes(b"old")
    (tmp_path / "link.wav").symlink_to(target)
    assert (
        output_module.save(b"new", ".wav", output_module.checked_output(tmp_path / "link.wav"))
        == tmp_path / "link.wav"
    )
    assert target.read_bytes() == b"new" and (tmp_path / "link.wav").is_symlink()

    os.mkfifo(tmp_path / "pipe")
    end = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    output_module.save(b"new", ".wav", output_module.checked_output(tmp_path / "pipe"))
    assert os.read(end, 10) == b"new" and (tmp_path / "pipe").is_fifo()
    os.close(end)


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert output_module.checked_output(None) is None
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UsageError, match="name a file elsewhere with -o"):
        output_module.checked_output(None)
    with pytest.raises(UsageError, match=r"^-o song\.wav: .* cannot be written to"):
        output_module.checked_output(Path("song.wav"))


def test_a_tilde_of_nobody_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("~nobody-here.wav").write_bytes(b"RIFF")
    schema = json.loads((ROOT / "openapi_schema.json").read_text())
    assert request_input(["input_audio=@~nobody-here.wav"], schema)["input_audio"].startswith("data:audio/")
    assert output_module.checked_output(Path("~nobody-here.wav")) == Path("~nobody-here.wav")


@pytest.mark.parametrize("name", [".", "nowhere/song.wav"])
def test_an_impossible_output_is_refused_before_the_work(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"^-o "):
        output_module.checked_output(tmp_path / name)


# The whole command


def command(cwd: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-P", "-m", "musicgen_svc.cli.predict", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_prediction_prints_its_path_seed_and_times(cog: FakeCog, tmp_path: Path) -> None:
    metrics = {
        "seed": 7,
        "audio_seconds": 8.0,
        "steps": 403,
        "load": 0.0,
        "generate": 12.345,
        "predict_time": 13.0,
    }
    cog.outcome = lambda id, values: (200, {"status": "succeeded", "output": WAV, "metrics": metrics})
    ended = command(tmp_path, "--url", cog.url, "-i", "prompt=a waltz", "-i", "duration=8", "-o", "song.wav")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [
        "song.wav",
        "  8.00 s of audio, seed 7, 403 steps",
        "  load 0.00 s, generate 12.35 s",
    ]
    assert "100%" in ended.stderr
    assert (tmp_path / "song.wav").read_bytes() == b"RIFF...."
    assert cog.started == [{"prompt": "a waltz", "duration": 8}]


def test_a_failed_prediction_is_its_sentence_and_status_1(cog: FakeCog, tmp_path: Path) -> None:
    cog.outcome = failure(
        (200, {"status": "failed", "error": "Prediction failed: InputError: prompt is bad; no."})
    )
    ended = command(tmp_path, "--url", cog.url, "-i", "prompt=bad")
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == "prompt is bad; no."
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_prediction_that_fails_at_once_is_told_without_empty_lines(cog: FakeCog, tmp_path: Path) -> None:
    cog.outcome = failure((200, {"status": "failed", "error": "Prediction failed: InputError: it is bad."}))
    assert command(tmp_path, "--url", cog.url, "-i", "prompt=bad").stderr == "it is bad.\n"


@pytest.mark.parametrize("name", ["-", "/dev/stdout"])
def test_audio_on_standard_output_is_alone_there(cog: FakeCog, tmp_path: Path, name: str) -> None:
    metrics = {"seed": 7, "audio_seconds": 8.0}
    cog.outcome = lambda id, values: (200, {"status": "succeeded", "output": WAV, "metrics": metrics})
    ended = command(tmp_path, "--url", cog.url, "-i", "prompt=x", "-o", name)
    assert (ended.returncode, ended.stdout) == (0, "RIFF....")
    assert ended.stderr.endswith("  8.00 s of audio, seed 7\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [("-", "The output cannot be written to standard output: "), ("a.wav", "a.wav is written, but standard")],
)
def test_a_reader_that_is_gone_is_one_sentence(cog: FakeCog, tmp_path: Path, name: str, words: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    arguments = ["--url", cog.url, "-i", "prompt=x", "-o", name]
    with open(writer, "wb") as out:  # noqa: PTH123 (a descriptor, not a path)
        ended = subprocess.run(
            [sys.executable, "-P", "-m", "musicgen_svc.cli.predict", *arguments], cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=out, stderr=subprocess.PIPE, text=True,
            timeout=60,
        )  # fmt: skip
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith(words)
    assert "Traceback" not in ended.stderr and "Exception ignored" not in ended.stderr


def test_a_name_that_is_no_text_is_printed_as_it_is(cog: FakeCog, tmp_path: Path) -> None:
    arguments = ["--url", cog.url, "-i", "prompt=x", "-o", b"caf\xe9"]
    shown = subprocess.run(
        [sys.executable, "-P", "-m", "musicgen_svc.cli.predict", *arguments], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8:strict"},
        capture_output=True, timeout=60,
    )  # fmt: skip
    assert (shown.returncode, shown.stdout.splitlines()[0]) == (0, b"caf\xe9"), shown.stderr


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    with predict_module.Progress() as progress:
        for percent, stage in [(0, ""), (5, "load"), (6, "generate"), (6, "generate"), (100, "done")]:
            progress.show(percent, stage)
    assert capsys.readouterr().err.splitlines() == ["load        5%", "done      100%"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-i", "promt=a waltz"], "There is no input 'promt'"),
        (["-i", "input_audio=clip.wav"], "input_audio is 'clip.wav'"),
        ([], 'prompt and input_audio are both missing: give at least one of them. Try -i prompt="'),
        (["-i", "prompt= "], "prompt and input_audio are both missing"),
        (["-i", "prompt=" + "x" * 2001], "prompt has 2001 characters; at most 2000 are accepted."),
        (["-i", "prompt=x", "-i", "duration=0"], "duration is '0'; it must be a whole number from 1 to 600."),
        (["-i", "prompt=x", "-i", "duration=9"], "duration is 9; it must be between 1 and 8."),
        (["-i", "prompt=x", "-i", "continuation=true"], "continuation is true but input_audio is missing"),
        (["-i", "model_version=encode-decode"], "model_version 'encode-decode' needs input_audio"),
        (["-i", b"prompt=caf\xe9"], "prompt: the value is not UTF-8 text"),
        (["-i", "prompt=x", "--url", "127.0.0.1:5791"], "--url 127.0.0.1:5791: a server's URL begins with"),
        (["-i", "prompt=x", "-o", "nowhere/x.wav"], "-o nowhere/x.wav: there is no folder"),
    ],
)
def test_a_wrong_command_line_is_status_2_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    arguments: list[str | bytes], words: str,
) -> None:  # fmt: skip
    def started(*_: object, **__: object) -> None:
        raise AssertionError("a server was started")

    monkeypatch.setattr(subprocess, "Popen", started)
    monkeypatch.setattr(sys, "argv", ["scripts/predict", *map(os.fsdecode, arguments)])
    monkeypatch.setattr(predict_module.signal, "signal", lambda *_: None)
    monkeypatch.setenv("MUSICGEN_MAX_DURATION_S", "8")
    monkeypatch.chdir(tmp_path)
    assert predict_module.main() == 2
    err = capfd.readouterr().err
    assert err.startswith(words) and err.count("\n") == 1


def test_another_services_inputs_are_not_judged_by_our_rules(cog: FakeCog, tmp_path: Path) -> None:
    cog.schema = {"components": {"schemas": {"Input": {"properties": {"text": {"type": "string"}}}}}}
    ended = command(tmp_path, "--url", cog.url, "-i", "text=hello")
    assert ended.returncode == 0, ended.stderr
    assert cog.started == [{"text": "hello"}]


def test_help_fits_80_columns(tmp_path: Path) -> None:
    shown = subprocess.run(
        [sys.executable, "-P", "-m", "musicgen_svc.cli.predict", "--help"], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"},
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    assert max(map(len, shown.splitlines())) < 80
    assert "  seed: a whole number from -1 to 4294967295\n" in shown
