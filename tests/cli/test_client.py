"""The client of a Cog server: answers, progress, waiting and cancelling."""

import io
import time
from collections.abc import Callable

import pytest
from tqdm import tqdm

from musicgen_svc.cli import client as client_module
from musicgen_svc.cli.client import Client, FailedError, progress
from tests.cli.fake_cog import WAV, Answer, FakeCog, Json
from tests.cli.repository import SCHEMA


def predict(client: Client, on_progress: client_module.OnProgress = lambda percent, stage: None) -> Json:
    """Runs one prediction."""
    return client.predict({"prompt": "a waltz"}, SCHEMA, on_progress, on_busy=lambda: None)


def failure(answer: Answer) -> Callable[[str, Json], Answer]:
    """An outcome that is always this answer."""
    return lambda id, values: answer


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
    monkeypatch.setattr(client_module, "PROGRESS_S", 0.01)

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
