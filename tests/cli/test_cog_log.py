"""Errors in Cog's log are shown without the prefixes that Cog and Python add."""

import io
import json

import pytest

from musicgen_svc.cli.cog_log import CogLog, Console, sentence


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


def written(as_json: bool, *lines: str) -> list[str]:
    """What the console writes for lines of Cog's log and a line of `scripts/serve`."""
    out = io.StringIO()
    console = Console(out, as_json)
    log = CogLog(console, lambda id: None, lambda id: None, lambda id: None)
    for line in lines:
        log.line(line)
    console.say("Ready.")
    return out.getvalue().splitlines()


def record(message: str) -> str:
    """A line of Cog's log."""
    fields = {"message": message, "prediction_id": "one"}
    return json.dumps(
        {"timestamp": "2026-01-01T00:00:00.5Z", "level": "INFO", "fields": fields, "target": "x"}
    )


def test_every_line_is_json_if_it_is_asked_for() -> None:
    plain, other, stage, own = map(
        json.loads, written(True, record("seed: 1"), "a panic", record('{"stage": "load", "seconds": 1.5}'))
    )
    assert plain == json.loads(record("seed: 1"))
    assert (other["fields"]["message"], other["target"]) == ("a panic", "cog")
    assert stage["fields"] == {
        "message": "load: 1.5 s", "prediction_id": "one", "stage": "load", "seconds": 1.5,
    }  # fmt: skip
    assert (own["fields"]["message"], own["target"]) == ("Ready.", "scripts/serve")
    assert plain.keys() == other.keys() == own.keys()


@pytest.mark.parametrize("message", ['{"stage": 1}', '{"stage": "a", "seconds": "b"}', "[1]", "1", "{"])
def test_a_message_that_only_looks_like_a_stage_stays_as_it_is(message: str) -> None:
    assert written(True, record(message))[0] == record(message)


def test_otherwise_lines_are_readable() -> None:
    shown = written(False, record("seed: 1"), "a panic")
    assert [line.partition(" ")[2] for line in shown] == ["[one] seed: 1", "panic", "Ready."]


@pytest.mark.parametrize(
    ("messages", "told", "runs"),
    [
        (["Starting prediction", "Cancelling prediction", "seed: 1"], 1, {"one"}),
        (["Starting prediction", "seed: 1", "Cancelling prediction"], 1, {"one"}),
        (["Starting prediction", "Cancelling prediction", "Applying pending cancellation"], 2, {"one"}),
        (["Starting prediction", "Cancelling prediction", "Prediction cancelled"], 1, set()),
        (["Starting prediction", "seed: 1", "Prediction worker completed"], 0, set()),
        (["Starting prediction", "Prediction cancelled", "Cancelling prediction"], 0, set()),
    ],
    ids=["before the worker", "while it runs", "twice", "with success", "none", "after the end"],
)  # fmt: skip
def test_a_cancelled_prediction_is_known_until_it_has_ended(
    messages: list[str], told: int, runs: set[str]
) -> None:
    """Cog may lose the cancel, and then the prediction runs on."""
    cancelled: list[str] = []
    console = Console(io.StringIO(), as_json=False)
    log = CogLog(console, lambda id: None, cancelled.append, lambda id: None)
    for message in messages:
        log.line(record(message))
    assert (len(cancelled), log.cancelled) == (told, runs)
