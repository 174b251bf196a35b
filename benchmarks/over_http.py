"""What the benchmarks of servers have in common: the command line, the request, and the results as JSON."""

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path

from musicgen_svc.runtime.machine import cores

Found = dict[str, object]


def run(script: str, description: str, rounds: int, measure: Callable[[int, int], Found]) -> None:
    """Runs a benchmark, prints what it has found, and writes it to the file of `--json`.

    Args:
        script: its name, for the help.
        description: of the command.
        rounds: how many there are unless `--rounds` says otherwise.
        measure: called with the number of rounds and the seconds of audio in each request.
    """
    parser = argparse.ArgumentParser(prog=script, description=description)
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--seconds", type=int, default=8, help="of audio in each request")
    given = parser.parse_args()
    machine = {"cores": cores(), "cpu": platform.machine(), "python": platform.python_version()}
    found = {"audio_seconds": given.seconds, **measure(given.rounds, given.seconds), "machine": machine}
    text = json.dumps(found, indent=2)
    print(text)
    if given.json:
        given.json.write_text(text + "\n")


def request(seconds: int) -> dict[str, object]:
    """Returns the input of a request for the demo model."""
    return {"prompt": "ode to joy on a music box", "duration": seconds, "seed": 1}
