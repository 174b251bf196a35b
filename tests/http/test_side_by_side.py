"""Several clients at once: each gets the same output as alone, and does not wait for the others' ends."""

import re
import time
from typing import Any

import pytest
from bodies import LONG, SHORT
from processes import LIMIT_S, wait_for
from replies import clip, output, percentages
from server import CogServer, Json

CLIENTS: dict[str, dict[str, Any]] = {
    "text": {"prompt": "rock", "duration": 6, "seed": 11, "temperature": 0.7, "output_format": "mp3"},
    "melody": {"prompt": "jazz", "duration": 3, "seed": 12, "input_audio": clip(2), "top_k": 50},
    "continuation": {
        "duration": 3, "seed": 13, "input_audio": clip(4), "continuation": True, "continuation_start": 1,
        "classifier_free_guidance": 7, "normalization_strategy": "peak",
    },
    "greedy": {"prompt": "slow piano", "duration": 4, "seed": 14, "temperature": 0},
}  # fmt: skip
AUDIO_S = {"text": 6, "melody": 3, "continuation": 6, "greedy": 4}


@pytest.fixture(scope="module")
def alone(four: CogServer) -> dict[str, Json]:
    """The reply to each client when it is alone."""
    return {name: four.predict(fields) for name, fields in CLIENTS.items()}


def started(server: CogServer, fields: dict[str, Any], id: str) -> Any:
    """Starts a prediction. Returns when it is in the queue of its model, or further."""
    future = server.submit(fields, id)
    while not future.done() and "%|" not in (server.state(id) or {"logs": "%|"})["logs"]:
        time.sleep(0.02)
    return future


def check_that_nothing_of_others_is_in(reply: Json, name: str, alone: Json) -> None:
    """Checks output, log and metrics of a reply."""
    assert output(reply) == output(alone)
    logs = reply["logs"]
    assert re.findall(r"seed: (\d+)", logs) == [str(CLIENTS[name]["seed"])]
    seen = percentages(logs)
    assert seen == sorted(seen) and seen[0] == 0 and seen[-1] == 100, seen
    rest = re.sub(r"\r *\d+%\|[^\r\n]*", "", logs)
    assert re.fullmatch(rf"seed: {CLIENTS[name]['seed']}\n\nseconds: (\w+ [\d.]+(, )?)+\n", rest), rest
    metrics = reply["metrics"]
    assert metrics["audio_seconds"] == AUDIO_S[name] and metrics["seed"] == CLIENTS[name]["seed"]
    assert metrics["steps"] == alone["metrics"]["steps"]
    assert metrics.keys() == alone["metrics"].keys()


def test_each_of_four_clients_gets_what_it_gets_alone(four: CogServer, alone: dict[str, Json]) -> None:
    futures = {name: four.submit(fields, name) for name, fields in CLIENTS.items()}
    for name, future in futures.items():
        check_that_nothing_of_others_is_in(future.result(timeout=LIMIT_S), name, alone[name])


def test_one_is_cancelled_and_the_rest_do_not_notice(four: CogServer, alone: dict[str, Json]) -> None:
    leaver = started(four, LONG, "leaver")
    names = ["text", "melody", "continuation"]
    futures = {name: four.submit(CLIENTS[name], f"beside-{name}") for name in names}
    wait_for(lambda: "generate" in (four.state("leaver") or {"logs": ""})["logs"])
    assert four.cancel("leaver") == 200
    assert leaver.result(timeout=LIMIT_S)["status"] == "canceled"
    for name, future in futures.items():
        check_that_nothing_of_others_is_in(future.result(timeout=LIMIT_S), name, alone[name])


def test_all_are_cancelled_and_the_next_request_is_served(four: CogServer) -> None:
    futures = {f"busy-{index}": started(four, LONG, f"busy-{index}") for index in range(4)}
    assert {four.cancel(id) for id in futures} == {200}
    assert {future.result(timeout=LIMIT_S)["status"] for future in futures.values()} == {"canceled"}
    output(four.predict(SHORT))


def test_none_waits_for_anothers_end(four: CogServer) -> None:
    long = started(four, LONG, "long")
    decode = {"model_version": "encode-decode", "input_audio": clip(1), "seed": 1}
    for fields in (SHORT, SHORT | {"input_audio": clip(1)}, decode):
        output(four.predict(fields))
    assert not long.done()
    four.cancel("long")
    assert long.result(timeout=LIMIT_S)["status"] == "canceled"


def test_requests_for_another_model_wait_and_absent_models_fail_at_once(four: CogServer) -> None:
    asked = {
        "first": SHORT | {"duration": 25},
        "other": SHORT | {"model_version": "small"},
        "absent": SHORT | {"model_version": "large"},
        "later": SHORT,
    }
    expected = {name: output(four.predict(asked[name])) for name in ("later", "other")}
    futures, ended = {}, []
    for name, fields in asked.items():
        futures[name] = started(four, fields, name)
        futures[name].add_done_callback(lambda _, name=name: ended.append(name))
    replies = {name: future.result(timeout=LIMIT_S) for name, future in futures.items()}
    assert ended[0] == "absent", "a request that cannot succeed must fail at once"
    assert "large" in replies["absent"]["error"]
    for name, content in expected.items():
        assert output(replies[name]) == content
    assert ended.index("later") < ended.index("other"), (
        "a later request for the model that runs shares the slots"
    )
    assert replies["other"]["metrics"]["queue"] > 0.2
