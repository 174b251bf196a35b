"""Requests beyond the slots wait and are answered in order. Those beyond the room to wait: test_serve.py."""

import re
import threading
from collections import Counter
from typing import Any

from bodies import LONG, SHORT
from processes import memory_bytes, needs_proc, wait_for, worker
from replies import clip, output
from server import CogServer, Json

CLIENTS, SLOTS = 200, 4
MEAN_BOUND, BOUND = 30, 100
"""By how many places the order of the answers may differ from that of the arrivals, on average and at most.
Cog's log tells both. It has what 200 requests print at once in another order, more so on a busy machine.
A random order would differ by 67 places on average."""


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
    four: CogServer,
) -> None:
    seeds = range(5)
    alone = {seed: output(four.predict(SHORT | {"seed": seed})) for seed in seeds}
    bodies = {f"client-{n}": SHORT | {"seed": n % len(seeds)} for n in range(CLIENTS)}
    replies = send_all(four, bodies)
    assert Counter(reply["code"] for reply in replies.values()) == {200: CLIENTS}
    for id, fields in bodies.items():
        assert output(replies[id]) == alone[fields["seed"]]
    waited_s = [reply["metrics"]["queue"] for reply in replies.values()]
    assert max(waited_s) > 4 * min(waited_s), "the metric tells the wait"
    assert "before this one)" in max(replies.values(), key=lambda reply: reply["metrics"]["queue"])["logs"]

    arrived = re.findall(r"\[(client-\d+)\] seed: ", four.log)
    completed = re.compile(r"\[(client-\d+)\] Prediction worker completed")
    wait_for(lambda: len(completed.findall(four.log)) >= CLIENTS)  # a reply may be faster than the log
    ended = completed.findall(four.log)
    assert len(arrived) == len(ended) == CLIENTS
    places = {id: place for place, id in enumerate(arrived)}
    moved = [abs(places[id] - place) for place, id in enumerate(ended)]
    assert sum(moved) <= MEAN_BOUND * CLIENTS and max(moved) <= BOUND


def test_a_client_that_sends_one_request_after_the_other_is_never_refused(four: CogServer) -> None:
    """Cog answers an instant before it frees a place, so with a single place it would refuse some of them."""
    for _ in range(20):
        assert four.request("POST", "/predictions", {"input": SHORT}).status_code == 200


@needs_proc
def test_the_clips_of_waiting_requests_are_not_in_the_workers_memory(four: CogServer) -> None:
    """They lie on disk. If it did not give freed memory back, the worker would keep some 13 MB for each."""
    fields = SHORT | {"input_audio": clip(78), "continuation": True, "continuation_end": 1}  # 5 MB
    output(four.predict(fields))
    blocker = [four.submit(LONG | {"seed": n}, f"blocker-{n}") for n in range(SLOTS)]
    before = memory_bytes(worker(four))
    replies: dict[str, Json] = {}
    bodies = {f"clip-{n}": fields for n in range(20)}
    sending = threading.Thread(target=lambda: replies.update(send_all(four, bodies)))
    sending.start()
    wait_for(lambda: len(set(re.findall(r"\[(clip-\d+)\] .* before this one", four.log))) == len(bodies))
    wait_for(lambda: memory_bytes(worker(four)) < before + 100e6)
    for n in range(SLOTS):
        four.cancel(f"blocker-{n}")
    sending.join()
    assert {future.result()["status"] for future in blocker} == {"canceled"}
    assert len({output(reply) for reply in replies.values()}) == 1
