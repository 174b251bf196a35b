"""Inputs on the command line: which JSON they become, and which sentence refuses them."""

import base64
import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator

from musicgen_svc.cli.inputs import MAX_FILE_BYTES, UsageError, checked_url, request_input
from musicgen_svc.runtime.json_object import Json
from tests.cli.repository import SCHEMA


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
    """Whether the command line is accepted."""
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
