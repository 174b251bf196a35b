"""`scripts/bench_serving`: measures servers of the demo model that share the cores of one machine.

    scripts/bench_serving --json benchmarks/results/serving.json

Each round takes every measurement once, so that all of them meet the same disturbances. The figures are
medians, and the ratios are medians of the rounds' ratios.
"""

import contextlib
import os
import statistics
import threading
import time
from collections.abc import Iterator

from benchmarks.over_http import Found, request, run
from musicgen_svc.cli.client import Client
from musicgen_svc.cli.own_server import own_server
from musicgen_svc.runtime.machine import cores

THREADS = "OMP_NUM_THREADS"


def main() -> None:
    """Runs the benchmark."""
    run("scripts/bench_serving", "Measures servers of the demo model on shared cores.", 7, measure)


def measure(rounds: int, seconds: int) -> Found:
    """Measures one server alone, two at once, and one whose model computes with all cores."""
    alone_s: list[float] = []
    two_s: list[float] = []
    all_threads_s: list[float] = []
    with server(None) as first, server(None) as second, server(str(cores())) as all_threads:
        for client in (first, second, all_threads):
            requests_s([client], seconds)
        for _ in range(rounds):
            alone_s.append(requests_s([first], seconds))
            two_s.append(requests_s([first, second], seconds))
            all_threads_s.append(requests_s([all_threads], seconds))
    return {
        "alone_s": alone_s,
        "two_at_once_s": two_s,
        "alone_with_all_threads_s": all_threads_s,
        "two_at_once_over_alone": _ratio(two_s, alone_s),
        "alone_over_all_threads": _ratio(alone_s, all_threads_s),
    }


def _ratio(numbers: list[float], others: list[float]) -> float:
    """Returns the median of the rounds' ratios."""
    return round(statistics.median(a / b for a, b in zip(numbers, others, strict=True)), 3)


@contextlib.contextmanager
def server(threads: str | None) -> Iterator[Client]:
    """Context manager of a server. `threads`: the user's number; None: the service chooses."""
    before = os.environ.pop(THREADS, None)
    if threads is not None:
        os.environ[THREADS] = threads
    try:
        with own_server() as client:
            client.await_ready()
            yield client
    finally:
        os.environ.pop(THREADS, None)
        if before is not None:
            os.environ[THREADS] = before


def requests_s(clients: list[Client], seconds: int) -> float:
    """Sends one request to each server at once. Returns the seconds until all of them are answered."""
    answers: list[str] = []

    def send(client: Client) -> None:
        answer = client.call("POST", "/predictions", {"input": request(seconds)}, timeout_s=None).json()
        answers.append(answer["status"])

    threads = [threading.Thread(target=send, args=(client,)) for client in clients]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed_s = time.perf_counter() - start
    assert answers == ["succeeded"] * len(clients), answers
    return round(elapsed_s, 3)


if __name__ == "__main__":
    main()
