"""`scripts/bench_live`: measures when the first sound of a request can be heard, on the demo model.

    scripts/bench_live --json benchmarks/results/live-demo.json

The time goes from sending the request to the first chunk of audio, over HTTP. Each round also takes the whole
time of the request, live and not, so that all three meet the same disturbances.
"""

import statistics
import time
from typing import Any

from benchmarks.over_http import Found, request, run
from musicgen_svc.cli.client import Client
from musicgen_svc.cli.live_client import predict_live
from musicgen_svc.cli.own_server import own_server


def main() -> None:
    """Runs the benchmark."""
    run("scripts/bench_live", "Measures the first sound of live audio on the demo model.", 15, measure)


def measure(rounds: int, seconds: int) -> Found:
    """Measures some rounds, after one that is not counted."""
    with own_server() as client:
        client.await_ready()
        measured = [round_s(client, request(seconds)) for _ in range(1 + rounds)][1:]
    first_s, live_s, plain_s = (list(column) for column in zip(*measured, strict=True))
    return {
        "first_sound_s": first_s,
        "live_s": live_s,
        "not_live_s": plain_s,
        "first_sound_median_s": round(statistics.median(first_s), 3),
        "live_over_not_live": round(
            statistics.median(a / b for a, b in zip(live_s, plain_s, strict=True)), 3
        ),
    }


def round_s(client: Client, fields: dict[str, Any]) -> tuple[float, float, float]:
    """Returns the seconds to the first sound, to the end of the live request, and of one that is not live."""
    heard_s: list[float] = []
    start = time.perf_counter()

    def on_chunk(chunk: dict[str, Any]) -> None:
        heard_s.append(time.perf_counter())

    predict_live(client, fields, lambda percent, stage: None, on_chunk, lambda: None)
    end = time.perf_counter()
    answer = client.call("POST", "/predictions", {"input": fields}, timeout_s=None).json()
    assert answer["status"] == "succeeded", answer
    return round(heard_s[0] - start, 3), round(end - start, 3), round(time.perf_counter() - end, 3)


if __name__ == "__main__":
    main()
