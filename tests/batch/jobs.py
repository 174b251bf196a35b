"""Makes job files in mixed modes, runs `scripts/batch` on them, and reads what it made."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sounds import encode, tone

from tests.cli.repository import ROOT

Json = dict[str, Any]

TIMES = ("queue_s", "load_s", "condition_s", "generate_s", "decode_s", "write_s")


def write_job(path: Path, rows: list[Json]) -> Path:
    """Writes a JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_clips(folder: Path) -> None:
    """Writes two clips, which the mixed rows name."""
    for name, hz in (("low.wav", 220.0), ("high.wav", 660.0)):
        (folder / name).write_bytes(encode(tone(hz, 1.5, 32_000), 32_000, "wav16"))


def mixed_rows(count: int, text_model: str = "small") -> list[Json]:
    """Returns rows of every mode. Every tenth has no seed, every eleventh no id; two of 100 have diffusion.

    Args:
        count: of rows.
        text_model: of the rows without a clip; those with a clip have `melody`.
    """
    modes: list[Json] = [
        {"model_version": text_model, "prompt": "a waltz"},
        {"model_version": "melody", "prompt": "a march", "input_audio": "low.wav"},
        {"model_version": "encode-decode", "input_audio": "high.wav"},
        {"model_version": "melody", "input_audio": "high.wav", "continuation": True},
        {"model_version": text_model, "prompt": "a reel", "output_format": "mp3", "temperature": 0},
    ]
    rows = []
    for number in range(count):
        row = {"id": f"row{number:03}", "duration": 1, "seed": number, **modes[number % len(modes)]}
        if number % 100 in (7, 53):
            row["multi_band_diffusion"] = True
        if number % 10 == 5:
            del row["seed"]
        if number % 11 == 5:
            del row["id"]
        rows.append(row)
    return rows


def environment(weights: Path, **variables: str) -> dict[str, str]:
    """Returns the environment for the tiny models on a CPU."""
    own = {"MUSICGEN_WEIGHTS_DIR": str(weights), "MUSICGEN_DEVICE": "cpu", "PYTHONPATH": str(ROOT)}
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    return {**os.environ, **own, "PYTHONPATH": paths, **variables}


def start(weights: Path, *arguments: object, **variables: str) -> "subprocess.Popen[str]":
    """Starts the command."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "musicgen_svc.cli.batch", *map(str, arguments)],
        env=environment(weights, **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


def run(weights: Path, *arguments: object, **variables: str) -> tuple[int, str, str]:
    """Runs the command. Returns its exit status, standard output and standard error."""
    process = start(weights, *arguments, **variables)
    out, err = process.communicate()
    return process.returncode, out, err


def wait_until(reached: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    """Waits until a command has reached something. Fails with what it printed, if it has ended before."""
    while not reached():
        assert process.poll() is None, "\n".join(process.communicate())
        time.sleep(0.01)


def results(folder: Path) -> list[Json]:
    """Returns the merged results. The audio must be there for each row that is made, and for no other."""
    assert [path.name for path in (folder / "results").glob("*.jsonl")] == ["results.jsonl"]
    lines = [json.loads(text) for text in (folder / "results" / "results.jsonl").read_text().splitlines()]
    made = {line["path"] for line in lines if line["error"] is None}
    assert made == {path.name for path in folder.iterdir() if path.suffix in (".wav", ".mp3")}
    return lines


def content(folder: Path) -> tuple[list[Json], dict[str, str]]:
    """Returns all that must be equal for the same job: results without times, and the hashes of the audio."""
    lines = [{name: value for name, value in line.items() if name not in TIMES} for line in results(folder)]
    audio = [path for path in folder.iterdir() if path.suffix in (".wav", ".mp3")]
    return lines, {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in audio}
