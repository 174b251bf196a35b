"""A job of a thousand rows with the demo model, killed ten times at random: about ten minutes.

It prints the audio per second, and how much memory the job takes over time.
"""

import os
import random
import time
from pathlib import Path

import pytest

from tests.batch.jobs import content, start, write_clips, write_job
from tests.batch.test_batch import workers_of
from tests.cli.repository import ROOT

ROWS, KILLS = 1000, 10
pytestmark = [
    pytest.mark.skipif("MUSICGEN_SOAK" not in os.environ, reason="takes minutes: run scripts/soak"),
    pytest.mark.timeout(3600),
]


def job_in(folder: Path) -> Path:
    """A job of a thousand rows of one second, of every mode except diffusion."""
    write_clips(folder)
    modes = (
        {"prompt": "ode to joy on a harp"},
        {"prompt": "jingle bells on a piano", "output_format": "mp3"},
        {"prompt": "a music box", "input_audio": "low.wav"},
        {"input_audio": "high.wav", "continuation": True, "continuation_end": 1},
        {"input_audio": "high.wav", "model_version": "encode-decode"},
    )
    rows = [{"id": f"row{number:04}", "duration": 1, **modes[number % 5]} for number in range(ROWS)]
    return write_job(folder / "jobs.jsonl", rows)


def resident_mb(pid: int) -> float:
    """The memory of a process."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return float(status.split("VmRSS:")[1].split()[0]) / 1024 if "VmRSS:" in status else 0.0


def test_a_thousand_rows_with_ten_kills_give_the_folder_of_an_undisturbed_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job, undisturbed, killed = job_in(tmp_path), tmp_path / "undisturbed", tmp_path / "killed"
    process = start(ROOT / "weights", job, "--out", undisturbed)
    memory: list[tuple[int, float]] = []
    while process.poll() is None:
        time.sleep(1.0)
        done = len(list(undisturbed.glob("row*")))
        memory.append((done, sum(map(resident_mb, [process.pid, *workers_of(process.pid)]))))
    shown, err = process.communicate()
    assert process.returncode == 0, err
    assert shown.split(": ")[1].startswith(f"{ROWS} made, 0 unchanged, 0 failed")
    early = max(mb for done, mb in memory if ROWS / 10 <= done < ROWS / 4)
    late = max(mb for done, mb in memory if done >= ROWS * 3 / 4)

    moments = random.Random(0)
    for _ in range(KILLS):
        process = start(ROOT / "weights", job, "--out", killed)
        before = len(list(killed.glob("row*")))
        wanted = before + moments.randrange(ROWS // KILLS)
        while len(list(killed.glob("row*"))) <= wanted and process.poll() is None:
            time.sleep(0.01)
        time.sleep(moments.random())
        process.kill()
        process.communicate()
    process = start(ROOT / "weights", job, "--out", killed)
    shown_last, err = process.communicate()
    assert process.returncode == 0, err
    assert content(killed) == content(undisturbed)
    with capsys.disabled():
        print(f"\nundisturbed: {shown}memory: {early:.0f} MB early, {late:.0f} MB late\nlast: {shown_last}")
    assert late < 1.1 * early, memory
