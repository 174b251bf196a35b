"""The metrics that are scraped from a real server add up to what its clients got."""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from bodies import LONG, SHORT
from processes import LIMIT_S, needs_proc, wait_for, worker
from prometheus_client.parser import text_string_to_metric_families
from replies import clip, output
from server import ROOT, CogServer, free_port

pytestmark = needs_proc
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(port: int) -> Samples:
    """All samples of a scrape, by name and labels."""
    with requests.Session() as session:
        session.trust_env = False
        answer = session.get(f"http://127.0.0.1:{port}/metrics", timeout=LIMIT_S)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def value(port: int, name: str, **labels: str) -> float:
    """One sample; 0 if it is not there."""
    return scrape(port).get((f"musicgen_{name}", tuple(sorted(labels.items()))), 0.0)


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def measured(weights: Path, port: int) -> Iterator[CogServer]:
    """A server with metrics, two slots, and room for many to wait."""
    with CogServer(
        COG_WEIGHTS=str(weights / "melody"), MUSICGEN_WEIGHTS_DIR=str(weights), OMP_NUM_THREADS="1",
        MUSICGEN_METRICS_PORT=str(port), MUSICGEN_SLOTS="2", COG_MAX_CONCURRENCY="20",
    ) as running:  # fmt: skip
        wait_for(lambda: "Ready after" in running.log)
        yield running


def test_counters_add_up_to_what_clients_got_under_load(measured: CogServer, port: int) -> None:
    before = scrape(port)
    bodies: list[dict[str, Any]] = [
        *(SHORT | {"seed": seed} for seed in range(4)),
        SHORT | {"model_version": "small", "duration": 2},
        SHORT | {"input_audio": clip(1), "continuation": True},
        {"input_audio": clip(1), "model_version": "encode-decode"},
        {"input_audio": clip(1), "continuation": True, "continuation_start": 9, "prompt": "a"},
        {},
        SHORT | {"model_version": "large"},
    ]
    answers = [measured.submit(body, f"load-{number}") for number, body in enumerate(bodies)]
    while not all(answer.done() for answer in answers):
        scrape(port)
    replies = [answer.result() for answer in answers]
    after = scrape(port)

    def added(name: str, **labels: str) -> float:
        key = f"musicgen_{name}", tuple(sorted(labels.items()))
        return after.get(key, 0.0) - before.get(key, 0.0)

    succeeded = [reply for reply in replies if reply["status"] == "succeeded"]
    assert len(succeeded) == 7
    assert added("requests_total", mode="text", model="finetuned", result="succeeded") == 4
    assert added("requests_total", mode="text", model="small", result="succeeded") == 1
    assert added("requests_total", mode="continuation", model="finetuned", result="succeeded") == 1
    assert added("requests_total", mode="encode-decode", model="encode-decode", result="succeeded") == 1
    assert added("requests_total", mode="continuation", model="finetuned", result="refused") == 1
    assert added("requests_total", mode="unknown", model="unknown", result="refused") == 1
    assert added("requests_total", mode="text", model="large", result="failed") == 1
    metrics = [reply["metrics"] for reply in succeeded]
    assert added("audio_seconds_total") == pytest.approx(sum(each["audio_seconds"] for each in metrics))
    assert added("decoding_steps_total") == sum(each["steps"] for each in metrics) > 0
    for stage in ("load", "generate", "decode", "write"):  # the stages of those that succeeded only
        of_clients = [each[stage] for each in metrics if each[stage]]
        assert added("stage_seconds_count", stage=stage) >= len(of_clients)
        assert added("stage_seconds_sum", stage=stage) >= sum(of_clients) - 0.001
    assert added("stage_seconds_sum", stage="generate") == pytest.approx(
        sum(each["generate"] for each in metrics), abs=0.001
    )
    assert after["musicgen_slots_in_use", ()] == after["musicgen_queue_length", ()] == 0
    assert after["musicgen_slots", ()] == 2


def test_slots_and_the_queue_are_told_while_requests_wait(measured: CogServer, port: int) -> None:
    running = [measured.submit(LONG, f"holds-{number}") for number in range(2)]
    wait_for(lambda: value(port, "slots_in_use") == 2)
    waiting = measured.submit(SHORT, "waits")
    wait_for(lambda: value(port, "queue_length") == 1)
    assert value(port, "slots_in_use") == 2
    assert [measured.cancel(f"holds-{number}") for number in range(2)] == [200, 200]
    assert {future.result(LIMIT_S)["status"] for future in running} == {"canceled"}
    output(waiting.result(LIMIT_S))
    wait_for(lambda: value(port, "slots_in_use") == value(port, "queue_length") == 0)


def test_a_cancelled_request_is_counted(measured: CogServer, port: int) -> None:
    labels = {"mode": "text", "model": "finetuned", "result": "cancelled"}
    before = value(port, "requests_total", **labels)
    running = measured.submit(LONG, "to-cancel")
    wait_for(lambda: value(port, "slots_in_use") == 1)
    measured.cancel("to-cancel")
    assert running.result(LIMIT_S)["status"] == "canceled"
    wait_for(lambda: value(port, "requests_total", **labels) == before + 1)
    wait_for(lambda: value(port, "slots_in_use") == 0)


def test_it_says_which_models_are_in_memory_and_what_the_worker_takes(measured: CogServer, port: int) -> None:
    output(measured.predict(SHORT | {"model_version": "small"}))
    assert value(port, "model_resident", model="small") == 1
    assert value(port, "model_resident", model="large") == 0
    resident = scrape(port)["process_resident_memory_bytes", ()]
    pages = int(Path(f"/proc/{worker(measured)}/statm").read_text().split()[1])
    assert resident == pytest.approx(pages * 4096, rel=0.5)


def test_the_docs_name_every_metric_and_no_other(measured: CogServer, port: int) -> None:
    output(measured.predict(SHORT))
    scraped = {
        re.sub("_(bucket|count|sum)$", "", name)
        for name, _ in scrape(port)
        if name.startswith("musicgen_") and not name.endswith("_created")
    }
    table = re.findall(
        r"^\| `(musicgen_\w+)` \|", (ROOT / "docs" / "kubernetes.md").read_text(), flags=re.MULTILINE
    )
    assert scraped == {name for name in table if "device_memory" not in name}


def test_a_restart_by_the_supervisor_finds_the_port_free(measured: CogServer, port: int) -> None:
    """This test kills the worker, and must be the last one that uses this server."""
    before = measured.log.count("Ready after")
    os.kill(worker(measured), signal.SIGKILL)
    wait_for(lambda: measured.log.count("Ready after") > before)
    output(measured.predict(SHORT))
    assert value(port, "requests_total", mode="text", model="finetuned", result="succeeded") == 1


def test_a_port_that_is_taken_is_said_at_set_up(measured: CogServer, weights: Path, port: int) -> None:
    with CogServer(
        COG_WEIGHTS=str(weights / "small"), MUSICGEN_WEIGHTS_DIR=str(weights), MUSICGEN_METRICS_PORT=str(port)
    ) as second:
        wait_for(lambda: "Setup failed: The metrics cannot be served at" in second.log)
        assert f"MUSICGEN_METRICS_PORT={port}" in second.log and "Traceback" not in second.log


def test_without_a_port_nothing_listens(server: CogServer) -> None:
    inodes = {
        link.readlink().name
        for link in Path(f"/proc/{worker(server)}/fd").iterdir()
        if str(link.readlink()).startswith("socket:")
    }
    listening = {
        f"socket:[{line.split()[9]}]"
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/{worker(server)}/net/{table}").read_text().splitlines()[1:]
        if line.split()[3] == "0A"
    }
    assert not inodes & listening
