"""`scripts/batch` from the job file to the folder, with worker processes and the tiny models."""

import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import soundfile
import torch

from tests.batch.jobs import content, mixed_rows, results, run, start, wait_until, write_clips, write_job


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A job of 200 rows in every mode."""
    write_clips(tmp_path)
    return write_job(tmp_path / "jobs.jsonl", mixed_rows(200))


def test_a_job_in_mixed_modes_makes_one_whole_file_for_each_row(
    weights: Path, job: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    status, shown, err = run(weights, job, "--out", out)
    assert status == 0, err
    assert "200 made, 0 unchanged, 0 failed" in shown
    lines = results(out)
    assert [line["id"] for line in lines if line["id"].startswith("row")] == [
        f"row{number:03}" for number in range(200) if number % 11 != 5
    ]
    assert len({line["id"] for line in lines}) == len(lines) == 200
    for line in lines:
        info = soundfile.info(out / line["path"])
        assert line["path"] == f"{line['id']}.{line['output_format']}"
        assert info.duration == pytest.approx(line["audio_s"], abs=0.1)
        assert re.fullmatch("[0-9a-f]{64}", line["parts_sha256"])
        assert (line["model_sha256"] is None) == (line["model_version"] == "encode-decode")
        assert (line["clip_sha256"] is None) == (line["input_audio"] is None)
        assert line["loudness_lufs"] is None or -80 < line["loudness_lufs"] < 0
        assert isinstance(line["seed"], int) and line["decode_s"] > 0


def test_a_job_that_is_killed_again_and_again_gives_the_folder_of_an_undisturbed_one(
    weights: Path, tmp_path: Path
) -> None:
    """Each run is killed after it has written a few more lines than were there."""
    write_clips(tmp_path)
    job = write_job(tmp_path / "jobs.jsonl", mixed_rows(25))
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    for number in range(2):
        wanted = lines_in(out) + 5
        process = start(weights, job, "--out", out)
        wait_until(lambda wanted=wanted: lines_in(out) >= wanted, process)
        process.kill()
        process.communicate()
        if number == 1:  # as if the line was written in part
            newest = max((out / "results").glob("run-*.jsonl"))
            newest.write_bytes(newest.read_bytes()[:-40])
    status, shown, err = run(weights, job, "--out", out)
    assert status == 0, err
    assert int(shown.split(" unchanged")[0].split()[-1]) >= 9, "at most one of the written lines was cut"
    assert run(weights, job, "--out", undisturbed, "--workers", 1)[0] == 0
    assert content(out) == content(undisturbed)
    assert not list(out.glob(".unfinished/*"))


def lines_in(folder: Path) -> int:
    """How many lines all runs have written."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("results/run-*.jsonl"))


def test_a_worker_that_is_killed_costs_no_row(weights: Path, tmp_path: Path) -> None:
    write_clips(tmp_path)
    job = write_job(tmp_path / "jobs.jsonl", mixed_rows(15))
    out = tmp_path / "out"
    process = start(weights, job, "--out", out, "--workers", 2)
    wait_until(lambda: lines_in(out) >= 5, process)
    os.kill(workers_of(process.pid)[0], signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert len({line["id"] for line in results(out)}) == 15


def workers_of(pid: int) -> list[int]:
    """The worker processes of a run."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_only_what_has_changed_is_made_again(weights: Path, tmp_path: Path) -> None:
    """A changed row, clip or model. A file that is gone is made again as well."""
    folder, out = tmp_path / "weights", tmp_path / "out"
    shutil.copytree(weights, folder, symlinks=True)
    write_clips(tmp_path)
    rows = mixed_rows(10)
    job = write_job(tmp_path / "jobs.jsonl", rows)

    def changed() -> set[str]:
        """The paths that this run makes, of rows that have an id."""
        before = {path.name: path.stat().st_ino for path in out.glob("row*.*")}
        status, _, err = run(folder, job, "--out", out)
        assert status == 0, err
        after = {path.name: path.stat().st_ino for path in out.glob("row*.*")}
        assert {line["path"] for line in results(out) if line["id"].startswith("row")} == after.keys()
        return {name for name in after if after[name] != before.get(name)}

    assert len(changed()) == 9
    assert changed() == set()
    rows[8] |= {"output_format": "mp3"}
    write_job(job, rows)
    (out / "row002.wav").unlink()
    shutil.copy(tmp_path / "high.wav", tmp_path / "low.wav")  # the clip of rows 1 and 6
    assert changed() == {"row008.mp3", "row002.wav", "row001.wav", "row006.wav"}
    for file in ("small/state_dict.bin", "multiband-diffusion/mbd_musicgen_32khz.th"):
        torch.save({**torch.load(folder / file, weights_only=False), "another": 1}, folder / file)
    assert changed() == {"row000.wav", "row004.mp3", "row009.mp3", "row007.wav"}


def test_a_row_that_fails_is_a_sentence_in_the_results(weights: Path, tmp_path: Path) -> None:
    rows = [
        {"id": "good", "prompt": "a waltz", "duration": 1, "model_version": "small"},
        {"id": "long", "prompt": "a waltz", "duration": 601},
        {"id": "switch", "prompt": "a waltz", "continuation": "maybe"},
        {"id": "nothing"},
        {
            "id": "gone",
            "prompt": "a waltz",
            "duration": 1,
            "model_version": "melody",
            "input_audio": "gone.wav",
        },
        {"id": "no-melody", "duration": 1, "model_version": "small", "input_audio": "low.wav"},
        {"id": "absent", "prompt": "a waltz", "model_version": "large"},
    ]
    write_clips(tmp_path)
    job, out = write_job(tmp_path / "jobs.jsonl", rows), tmp_path / "out"
    for _ in range(2):  # a failed row is tried again, and fails again
        status, shown, err = run(weights, job, "--out", out)
        assert status == 6, err
        assert "6 failed" in shown
        errors = {line["id"]: line["error"] for line in results(out)}
        assert errors["good"] is None
        assert errors["long"] == "duration is 601; it must be between 1 and 600."
        assert errors["switch"] == "continuation is 'maybe'; it must be true or false."
        assert errors["nothing"] == "prompt and input_audio are both missing: give at least one of them."
        assert "input_audio cannot be opened" in errors["gone"]
        assert "cannot follow a melody" in errors["no-melody"]
        assert "'large' has no weights here: run scripts/download_weights large" in errors["absent"]


def test_a_job_that_cannot_be_used_is_refused_before_anything_is_made(weights: Path, tmp_path: Path) -> None:
    job, out = write_job(tmp_path / "jobs.jsonl", [{"promt": "a waltz"}]), tmp_path / "out"
    status, shown, err = run(weights, job, "--out", out)
    assert (status, shown) == (102, "")
    assert err.startswith(
        "jobs.jsonl, line 1, column 'promt': there is no input 'promt'; there are id, model"
    )
    assert not out.exists()
    for arguments in ([job], [job, "--out", out, "--slots", "0"], [job, "--out", out, "--workers", "many"]):
        assert run(weights, *arguments)[0] == 102


def test_where_nothing_can_run_the_reason_is_one_sentence(weights: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path / "jobs.jsonl", [{"prompt": "a waltz"}])
    status, _, err = run(weights, job, "--out", tmp_path / "out", MUSICGEN_DEVICE="cuda:99")
    assert status == 101
    assert "MUSICGEN_DEVICE is 'cuda:99', but there" in err.splitlines()[-1]


def test_the_number_of_threads_stays_that_of_the_first_run(weights: Path, tmp_path: Path) -> None:
    job, out = write_job(tmp_path / "jobs.jsonl", mixed_rows(1)), tmp_path / "out"
    assert run(weights, job, "--out", out, "--threads", 2)[0] == 0
    status, _, err = run(weights, job, "--out", out, "--threads", 1)
    assert status == 102 and "were made with 2" in err
    (out / "row000.wav").unlink()
    assert run(weights, job, "--out", out)[0] == 0
    assert results(out)[0]["threads"] == 2


def test_an_interrupted_job_says_how_to_go_on(weights: Path, tmp_path: Path) -> None:
    job = write_job(
        tmp_path / "jobs.jsonl",
        [{"id": "long", "prompt": "a waltz", "duration": 600, "model_version": "small"}],
    )
    process = start(weights, job, "--out", tmp_path / "out")
    wait_until((tmp_path / "out" / "job.json").exists, process)  # a model is loaded
    worker = workers_of(process.pid)[0]
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert err.endswith("Interrupted. The same command resumes the job.\n")
    assert not Path(f"/proc/{worker}").exists()
