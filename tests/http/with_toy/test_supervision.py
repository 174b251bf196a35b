"""The supervisor notices processes that end or hang and places that are lost, and the next request is served.

`scripts/soak` runs the same tests with the demo model instead of the toy, and with many more attempts.
"""

import contextlib
import http.client
import json
import os
import random
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests
import toy
from bodies import LONG
from processes import LIMIT_S, cog, needs_proc, processes_with, variable, wait_for, worker
from replies import clip
from server import ROOT, CogServer

from musicgen_svc.cli.prediction_folders import COG_FOLDER

SOAK = bool(os.environ.get("MUSICGEN_SOAK"))
HANG_UPS, CANCELS = (1000, 300) if SOAK else (60, 40)
SLOTS = 4
RESTART_S = 240 if SOAK else 120
"""How long a restart may take. In a soak it comes after others, and waits longer each time."""

pytestmark = [needs_proc, pytest.mark.timeout(3000 if SOAK else 300)]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if SOAK:
        return ROOT
    return toy.checkout(tmp_path_factory.mktemp("supervised"), SILENT_S=2, HEALTH_S=4, LONGEST_BACK_OFF_S=0.5)


@pytest.fixture(scope="module")
def server(checkout: Path) -> Iterator[CogServer]:
    with CogServer(root=checkout, COG_MAX_CONCURRENCY=str(SLOTS)) as running:
        wait_for(lambda: "Ready after" in running.log)  # the supervisor logs it after Cog says READY
        yield running


@pytest.fixture(scope="module")
def right(server: CogServer) -> list[str]:
    """Outputs of the requests `good(0)`, `good(1)` ... of a fresh server."""
    return [server.predict(good(number))["output"] for number in range(SLOTS)]


def good(number: int) -> dict[str, object]:
    """A request that succeeds."""
    return {"prompt": f"ode to joy on a harp {number}", "duration": 1, "seed": number}


def check_that_it_serves(server: CogServer, right: list[str], within_s: float = LIMIT_S) -> None:
    """Checks that a request gets its right output in time, and so do as many at once as there are places."""
    deadline = time.monotonic() + within_s
    while True:
        with contextlib.suppress(requests.RequestException):
            if server.predict(good(0)).get("output") == right[0]:
                break
        assert time.monotonic() < deadline, server.log
        time.sleep(0.2)
    answers = [server.submit(good(number), f"good-{number}") for number in range(SLOTS)]
    assert [answer.result(LIMIT_S).get("output") for answer in answers] == right


def await_restart(server: CogServer, before: int) -> None:
    """Waits until the server has become ready again."""
    deadline = time.monotonic() + RESTART_S
    while server.log.count("Ready after") == before:
        assert time.monotonic() < deadline, server.log
        time.sleep(0.05)


def message(method: str, target: str, body: object) -> bytes:
    """An HTTP request."""
    content = json.dumps(body).encode()
    head = f"{method} {target} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def send(server: CogServer, content: bytes) -> socket.socket:
    """Opens a connection to the server and sends this."""
    address = urlsplit(server.url)
    client = socket.create_connection((address.hostname or "", address.port or 0), timeout=LIMIT_S)
    client.sendall(content)
    return client


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
@pytest.mark.parametrize("victim", [worker, cog], ids=["the worker", "Cog's own process"])
def test_a_process_that_is_killed_is_replaced(
    server: CogServer, right: list[str], victim: Callable[[CogServer], int], number: signal.Signals
) -> None:
    before = server.log.count("Ready after")
    os.kill(victim(server), number)
    await_restart(server, before)
    check_that_it_serves(server, right)
    assert "Cog's server is restarted" in server.log


@pytest.mark.parametrize("victim", [worker, cog], ids=["the worker", "Cog's own process"])
def test_a_process_that_is_stopped_is_replaced(
    server: CogServer, right: list[str], victim: Callable[[CogServer], int]
) -> None:
    before = server.log.count("Ready after")
    os.kill(victim(server), signal.SIGSTOP)
    await_restart(server, before)
    check_that_it_serves(server, right)


def test_lost_places_are_restored_when_most_are_lost_and_nothing_runs(
    server: CogServer, right: list[str]
) -> None:
    """A client that does not go through the gate can still make Cog lose its places."""
    before = server.log.count("Ready after")
    port = int(variable(worker(server), "PORT"))
    running = server.submit(LONG, "runs-on")
    for number in range(SLOTS - 1):
        with socket.create_connection(("127.0.0.1", port)) as client:
            id = "x" * 300 + str(number)
            client.sendall(message("PUT", f"/predictions/{id}", {"input": good(0)}))
            assert b"File name too long" in client.recv(9999)
    wait_for(lambda: "of its 4 places for predictions are lost" in server.log)
    assert server.log.count("Ready after") == before
    server.cancel("runs-on")
    assert running.result(LIMIT_S)["status"] == "canceled"
    await_restart(server, before)
    check_that_it_serves(server, right)


def test_a_dead_worker_is_replaced_although_a_restart_for_lost_places_must_wait(
    server: CogServer, right: list[str]
) -> None:
    """Restarts for lost places come at most every five minutes."""
    before, lost = server.log.count("Ready after"), server.log.count("places for predictions are lost")
    port = int(variable(worker(server), "PORT"))
    for number in range(SLOTS - 1):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(message("PUT", f"/predictions/{'x' * 300}{number}", {"input": good(0)}))
            client.recv(9999)
    wait_for(lambda: server.log.count("places for predictions are lost") > lost)
    assert server.log.count("Ready after") == before and re.search(
        r"is restarted in \d+ s: 3 of its 4 places", server.log
    )
    os.kill(worker(server), signal.SIGKILL)
    await_restart(server, before)
    check_that_it_serves(server, right)


def test_predictions_that_come_during_a_restart_wait_for_it(server: CogServer, right: list[str]) -> None:
    before = server.log.count("Cog's server is restarted")
    os.kill(cog(server), signal.SIGKILL)
    wait_for(lambda: server.log.count("Cog's server is restarted") > before)
    assert server.predict(good(1))["output"] == right[1]


def test_nothing_outlives_a_supervisor_that_is_killed(checkout: Path, tmp_path: Path) -> None:
    with CogServer(root=checkout, TMPDIR=str(tmp_path)) as server:
        server.submit(LONG, id="left-alone")
        wait_for(lambda: (COG_FOLDER / "left-alone").exists())
        os.kill(server.process.pid, signal.SIGKILL)
        wait_for(lambda: processes_with(str(tmp_path)) == [])
        wait_for(lambda: list(tmp_path.iterdir()) == [])
        wait_for(lambda: not (COG_FOLDER / "left-alone").exists())


@pytest.mark.parametrize(
    "id",
    [
        "x" * 300, "%2Ftmp%2Fmusicgen-odd", "..", ".", "%2e%2e", "a%00b", "a%2Fb", "%2e%2e%2Fup", "a%0Ab",
        "caf%C3%A9", "a b", "-", "x#y",
    ],
)  # fmt: skip
def test_an_id_that_cog_cannot_bear_is_refused(server: CogServer, id: str) -> None:
    for target in (f"/predictions/{id}", f"/trainings/{id}", f"http://x/predictions/{id}"):
        with send(server, message("PUT", target, {"input": good(0)})) as client:
            answer = http.client.HTTPResponse(client, method="PUT")
            answer.begin()
            assert answer.status in (400, 422)
            assert "error" in (told := json.loads(answer.read())) or "detail" in told
    assert not Path("/tmp/musicgen-odd").exists()


def test_a_thousand_long_ids_cost_other_clients_no_request(server: CogServer, right: list[str]) -> None:
    """The ids are in the URL, and in the body, where Cog accepts one too."""
    restarts = server.log.count("is restarted")
    refused = []

    def attack() -> None:
        for number in range(500):
            id = f"{number}" + "x" * 300
            for content in (
                message("PUT", f"/predictions/{id}", {"input": good(0)}),
                message("POST", "/predictions", {"id": id, "input": good(0)}),
            ):
                with send(server, content) as client:
                    refused.append(b" 422 " in client.recv(64))

    attacker = threading.Thread(target=attack, daemon=True)
    attacker.start()
    served = 0
    while attacker.is_alive():
        assert server.predict(good(0))["output"] == right[0]
        served += 1
    assert refused == [True] * 1000 and served
    assert server.log.count("is restarted") == restarts
    check_that_it_serves(server, right)


def test_an_id_that_is_a_name_is_the_clients_own(server: CogServer) -> None:
    assert server.predict(good(0), id="Track_01.take-2")["id"] == "Track_01.take-2"
    first, second = (server.predict(good(0))["id"] for _ in range(2))
    assert first != second


def test_hanging_up_at_any_time_locks_nothing(server: CogServer, right: list[str]) -> None:
    """Clients hang up within milliseconds, some before all was sent. Cog starts threads for the clip."""
    draw = random.Random(1)
    fields = {"model_version": "encode-decode", "input_audio": clip(0.3)}
    content = message("POST", "/predictions", {"input": fields})
    for number in range(HANG_UPS):
        with send(server, content if number % 4 else content[: draw.randrange(1, len(content))]):
            time.sleep(draw.random() * 0.005)
    check_that_it_serves(server, right)


def test_who_hangs_up_at_once_leaves_nothing_running(server: CogServer, right: list[str]) -> None:
    """Cog loses a hang-up that comes before its worker has begun, and then runs the prediction."""
    content = message("POST", "/predictions", {"input": LONG})
    for _ in range(20):
        send(server, content).close()
        wait_for(lambda: server.health()["status"] == "READY")
    wait_for(lambda: server.predict(good(0))["metrics"]["running"] == 1)
    check_that_it_serves(server, right)


def test_a_cancel_at_any_time_leaves_nothing_running(server: CogServer, right: list[str]) -> None:
    """Cog reports some of them as cancelled although they run on. These end by themselves."""
    draw = random.Random(2)

    def start(id: str, answers: list[requests.Response]) -> None:
        while (answer := server.request("PUT", f"/predictions/{id}", {"input": LONG})).status_code == 409:
            time.sleep(0.01)
        answers.append(answer)

    for number in range(CANCELS):
        id, answers = f"cancelled-{number}", list[requests.Response]()
        sender = threading.Thread(target=start, args=(id, answers))
        sender.start()
        time.sleep(draw.random() * 0.003)
        while sender.is_alive():
            server.cancel(id)
            sender.join(0.02)
        assert answers[0].json()["status"] in ("canceled", "failed")
    check_that_it_serves(server, right)
    if not SOAK:
        wait_for(lambda: server.predict(good(0))["metrics"]["running"] == 1)


def test_what_cog_makes_for_a_prediction_is_gone_when_it_has_ended(server: CogServer) -> None:
    ids = [f"folder-{number}" for number in range(6)]
    for id in ids[:3]:
        server.predict(good(0) | {"input_audio": clip(0.3), "continuation": True}, id)
    for id in ids[3:]:
        server.submit(LONG, id)
        server.cancel(id)
    wait_for(lambda: not any((COG_FOLDER / id).exists() for id in ids))
