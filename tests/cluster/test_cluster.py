"""`scripts/batch --ray` on a real cluster of two workers. Without Ray, these tests fail."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import ray

from musicgen_svc.batch.cluster import Cluster, _connect
from musicgen_svc.batch.cluster_workers import ClusterWorker
from musicgen_svc.batch.rows import Row
from musicgen_svc.batch.work import MADE_OF, Plan, RunnerError, Task
from musicgen_svc.batch.worker import Worker
from tests.batch.jobs import content, mixed_rows, results, run, start, wait_until, write_clips, write_job
from tests.cluster.conftest import VARIABLES, processes_with
from tests.cluster.workers import DyingWorker
from tests.fields import FIELDS

Json = dict[str, Any]

pytestmark = pytest.mark.timeout(900)  # Ray's first start can take minutes on a busy machine


def test_a_job_gives_the_same_folder_as_without_ray_although_a_worker_is_killed(
    weights: Path, cluster: int, tmp_path: Path
) -> None:
    write_clips(tmp_path)
    job = write_job(tmp_path / "jobs.jsonl", mixed_rows(200, "melody"))
    out, tag = tmp_path / "out", f"job-{os.getpid()}"
    address = f"ray://127.0.0.1:{cluster}"
    process = start(weights, job, "--out", out, "--ray", address, **VARIABLES, MUSICGEN_TAG=tag)
    wait_until(lambda: len(list(out.glob("*.wav"))) >= 10, process)
    os.kill(processes_with("ray::MapWorker", tag)[0], signal.SIGKILL)
    shown, err = process.communicate()
    assert process.returncode == 0, err
    assert "200 made, 0 unchanged, 0 failed" in shown
    assert len({line["id"] for line in results(out)}) == len(results(out)) == 200

    few = write_job(tmp_path / "few.jsonl", mixed_rows(200, "melody")[:20])
    assert run(weights, few, "--out", tmp_path / "few", "--parquet")[0] == 0
    lines, audio = content(tmp_path / "few")
    all_lines, all_audio = content(out)
    assert lines == all_lines[:20]
    assert audio.items() <= all_audio.items()
    table = pyarrow.parquet.read_table(tmp_path / "few" / "results" / "results.parquet").to_pylist()
    assert table == results(tmp_path / "few")


def test_a_row_that_always_ends_its_worker_fails_alone(cluster: int, tmp_path: Path) -> None:
    prompts = ["make"] * 4 + ["die"] + ["make"] * 3
    tasks = [
        Task(Row(str(number), {"prompt": prompt, "model_version": "small"}, None, None), None)
        for number, prompt in enumerate(prompts)
    ]
    errors: dict[str, str | None] = {}
    decided: list[Plan] = []

    def settle(row: Row, outcome: Json, file: Path | None) -> None:
        assert row.id not in errors, "settled twice"
        errors[row.id] = outcome["error"]

    runner = Cluster(Plan(0, 1, 1), f"ray://127.0.0.1:{cluster}", tmp_path, decided.append)
    runner.worker = DyingWorker
    runner.run(tasks, settle)
    assert decided == [Plan(0, 1, 1)]
    assert {row for row, error in errors.items() if error is None} == set("0123567")
    assert errors["4"] == "The worker process ended 3 times while it made this row; Ray's log has the cause."


def test_a_worker_on_a_cluster_loads_no_model_for_rows_that_are_unchanged(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUSICGEN_WEIGHTS_DIR", str(weights))
    monkeypatch.setenv("MUSICGEN_DEVICE", "cpu")
    task = {"id": "a", "fields": FIELDS | {"model_version": "small"}, "clip": None}
    made = Worker(slots=1, threads=1).run(task, tmp_path)
    worker = ClusterWorker(Plan(0, 1, 1), "small", None)
    known = {name: made[name] for name in MADE_OF}
    answer = worker(pyarrow.table({"task": [json.dumps(task | {"known": known})]}))
    assert json.loads(answer["message"][0].as_py()) == {
        "id": "a",
        "outcome": {"error": None, "unchanged": True},
    }
    assert worker.capacity is None and not worker._worker._backend.loader.in_memory("small")


def test_parquet_jobs_are_read_and_refused_with_their_column(weights: Path, tmp_path: Path) -> None:
    job = tmp_path / "jobs.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"id": ["a", "b"], "prompt": ["a waltz", None], "duration": [601, None]}), job
    )
    status, _, err = run(weights, job, "--out", tmp_path / "out")
    assert status == 2, err
    errors = [line["error"] for line in results(tmp_path / "out")]
    assert errors[0].startswith("duration is 601;") and errors[1].startswith(
        "prompt and input_audio are both"
    )
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"], "promt": ["b"]}), job)
    status, _, err = run(weights, job, "--out", tmp_path / "out")
    assert status == 102 and err.startswith("jobs.parquet, line 1, column 2: there is no input 'promt'")


def test_where_no_cluster_answers_the_reason_is_one_sentence(weights: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path / "jobs.jsonl", [{"prompt": "a waltz"}])
    status, _, err = run(weights, job, "--out", tmp_path / "out", "--ray", "ray://127.0.0.1:1", **VARIABLES)
    assert status == 101
    assert "--ray is 'ray://127.0.0.1:1', where no cluster answers (" in err.splitlines()[-1]


def test_the_script_starts_clusters_without_grpcs_fork_handlers(cluster: int) -> None:
    """With them, the process for a client's connection often ends before it has begun."""
    assert processes_with(f"--port={cluster}", "--mode=proxy", "GRPC_ENABLE_FORK_SUPPORT=0")


class Refusals:
    """Takes the place of `ray.init`, and refuses some connections, as a cluster on a busy machine does."""

    def __init__(self, count: int) -> None:
        """Makes a function that refuses so many connections."""
        self.left = count

    def __call__(self, address: str, **_: object) -> None:
        """Refuses a connection, or makes none."""
        if self.left:
            self.left -= 1
            raise ConnectionAbortedError(
                "Initialization failure from server:\nTraceback (most recent call last):\n  File ...\n"
                "RuntimeError: Proxy failed to Connect to backend! See the logs.\n"
            )


def test_a_connection_that_a_busy_cluster_refuses_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    refusals = Refusals(3)
    monkeypatch.setattr("musicgen_svc.batch.cluster.RETRY_S", 0.0)
    monkeypatch.setattr(ray, "init", refusals)
    _connect("ray://127.0.0.1:10001", {})
    assert refusals.left == 0


def test_the_reason_for_refusals_is_the_last_line_of_the_clusters_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("musicgen_svc.batch.cluster.START_S", 0.0)
    monkeypatch.setattr("musicgen_svc.batch.cluster.RETRY_S", 0.0)
    monkeypatch.setattr(ray, "init", Refusals(1))
    with pytest.raises(
        RunnerError,
        match=r"refused each connection for 0 s \(RuntimeError: Proxy failed .* See the logs\); Ray",
    ):
        _connect("ray://127.0.0.1:10001", {})
