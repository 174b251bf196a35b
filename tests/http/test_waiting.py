"""Requests beyond the slots wait and are answered; those beyond the room to wait are refused with 409."""

import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bodies import LONG, SHORT
from processes import memory_bytes, needs_proc, wait_for, worker
from replies import clip, output, sentence
from server import CogServer, Json

CLIENTS, SLOTS = 200, 4
BOUND = 40
"""By how many places the order of the answers may differ from that of the arrivals, as Cog's log tells both.
Cog logs what 200 requests print at once in a slightly different order."""


@pytest.fixture(scope="module")
def waiting(weights: Path) -> Iterator[CogServer]:
    """A server with four slots and room for 200 that wait."""
    with CogServer(
        COG_WEIGHTS=str(weights / "melody"), MUSICGEN_WEIGHTS_DIR=str(weights), OMP_NUM_THREADS="1",
        COG_MAX_CONCURRENCY="", MUSICGEN_SLOTS=str(SLOTS), MUSICGEN_WAITING=str(CLIENTS),
    ) as running:  # fmt: skip
        assert running.health()["status"] == "READY", running.log
        yield running


def send_all(server: CogServer, bodies: dict[str, dict[str, Any]]) -> dict[str, Json]:
    """Sends all requests at once. Returns the reply to each id, with the HTTP status as `code`."""
    replies: dict[str, Json] = {}

    def send(id: str, fields: dict[str, Any]) -> None:
        response = server.request("PUT", f"/predictions/{id}", {"input": fields})
        replies[id] = {"code": response.status_code, **response.json()}

    threads = [threading.Thread(target=send, args=item) for item in bodies.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return replies


def test_200_clients_at_once_are_answered_in_order_with_the_bytes_that_each_gets_alone(
    waiting: CogServer,
) -> None:
    seeds = range(5)
    alone = {seed: output(waiting.predict(SHORT | {"seed": seed})) for seed in seeds}
    bodies = {f"client-{n}": SHORT | {"seed": n % len(seeds)} for n in range(CLIENTS)}
    replies = send_all(waiting, bodies)
    assert Counter(reply["code"] for reply in replies.values()) == {200: CLIENTS}
    for id, fields in bodies.items():
        assert output(replies[id]) == alone[fields["seed"]]
    waited_s = [reply["metrics"]["queue"] for reply in replies.values()]
    assert max(waited_s) > 4 * min(waited_s), "the metric tells the wait"
    assert "before this one)" in max(replies.values(), key=lambda reply: reply["metrics"]["queue"])["logs"]

    arrived = re.findall(r"\[(client-\d+)\] seed: ", waiting.log)
    ended = re.findall(r"\[(client-\d+)\] Prediction worker completed", waiting.log)
    assert len(arrived) == len(ended) == CLIENTS
    places = {id: place for place, id in enumerate(arrived)}
    assert max(abs(places[id] - place) for place, id in enumerate(ended)) <= BOUND


def test_a_client_that_sends_one_request_after_the_other_is_never_refused(waiting: CogServer) -> None:
    """Cog answers an instant before it frees a place, so with a single place it would refuse some of them."""
    for _ in range(20):
        assert waiting.request("POST", "/predictions", {"input": SHORT}).status_code == 200


@needs_proc
def test_the_clips_of_waiting_requests_are_not_in_the_workers_memory(waiting: CogServer) -> None:
    """They lie on disk. If it did not give freed memory back, the worker would keep some 13 MB for each."""
    fields = SHORT | {"input_audio": clip(78), "continuation": True, "continuation_end": 1}  # 5 MB
    output(waiting.predict(fields))
    blocker = [waiting.submit(LONG | {"seed": n}, f"blocker-{n}") for n in range(SLOTS)]
    before = memory_bytes(worker(waiting))
    replies: dict[str, Json] = {}
    bodies = {f"clip-{n}": fields for n in range(40)}
    sending = threading.Thread(target=lambda: replies.update(send_all(waiting, bodies)))
    sending.start()
    wait_for(lambda: len(set(re.findall(r"\[(clip-\d+)\] .* before this one", waiting.log))) == len(bodies))
    wait_for(lambda: memory_bytes(worker(waiting)) < before + 100e6)
    for n in range(SLOTS):
        waiting.cancel(f"blocker-{n}")
    sending.join()
    assert {future.result()["status"] for future in blocker} == {"canceled"}
    assert len({output(reply) for reply in replies.values()}) == 1


def test_a_waiting_request_is_cancelled_at_once_and_not_timed(weights: Path) -> None:
    """Its time limit counts from the moment when it gets a slot."""
    with CogServer(
        COG_WEIGHTS=str(weights / "melody"), MUSICGEN_WEIGHTS_DIR=str(weights), OMP_NUM_THREADS="1",
        COG_MAX_CONCURRENCY="3", MUSICGEN_SLOTS="1", MUSICGEN_MAX_REQUEST_S="3",
    ) as server:  # fmt: skip
        expected = output(server.predict(SHORT))
        first = server.submit(LONG, "first")
        wait_for(lambda: "[first] " in server.log and "generate" in server.log)
        kept, left = server.submit(SHORT, "kept"), server.submit(SHORT, "left")
        wait_for(lambda: "queue (1 before this one)" in server.log)
        assert server.cancel("left") == 200
        assert left.result(timeout=20)["status"] == "canceled"
        assert not first.done() or "longer than the limit" in sentence(first.result())
        assert "longer than the limit of 3 s" in sentence(first.result(timeout=60))
        assert output(kept.result(timeout=60)) == expected
        # Absent models and wrong inputs are refused before the wait.
        again = server.submit(LONG, "again")
        wait_for(lambda: "[again] " in server.log)
        refused = server.predict(SHORT | {"model_version": "large"})
        assert "large" in sentence(refused) and not again.done()
        assert server.cancel("again") == 200


def test_by_default_64_wait_and_the_next_is_refused(checkout: Path) -> None:
    held = {f"held-{n}": {"prompt": "a waltz", "duration": 600} for n in range(2 + 64)}
    with CogServer(root=checkout, COG_MAX_CONCURRENCY="", MUSICGEN_SLOTS="2") as server:
        futures = {id: server.submit(fields, id) for id, fields in held.items()}
        assert server.request("POST", "/predictions", {"input": SHORT}).status_code == 409
        assert {server.cancel(id) for id in held} == {200}
        assert {future.result(timeout=60)["status"] for future in futures.values()} == {"canceled"}
        deadline = time.monotonic() + 10
        while server.health()["status"] == "BUSY" and time.monotonic() < deadline:
            time.sleep(0.05)
        assert server.predict(SHORT)["status"] == "succeeded"
