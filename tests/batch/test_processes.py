"""The fleet: how many workers it starts, what it sends them, and what happens when they end."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from musicgen_svc.batch.processes import Fleet
from musicgen_svc.batch.rows import Row
from musicgen_svc.batch.work import Plan, RunnerError, Task

Json = dict[str, Any]


@pytest.fixture(autouse=True)
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("musicgen_svc.batch.processes.WORKER_MODULE", "tests.batch.scripted_worker")


class Run:
    """One run of a fleet, and what it did."""

    def __init__(self, folder: Path, *rows: tuple[str, ...], workers: int = 0) -> None:
        """Runs rows of (prompt, model), or (prompt, model, model hash of an earlier run)."""
        self.errors: dict[str, str | None] = {}
        self.unchanged: set[str] = set()
        self.decided: list[Plan] = []
        self.folder = folder
        tasks = [
            Task(
                Row(str(number), {"prompt": prompt, "model_version": model}, None, None),
                {"model_sha256": known[0]} if known else None,
            )
            for number, (prompt, model, *known) in enumerate(rows)
        ]

        def settle(row: Row, outcome: Json, file: Path | None) -> None:
            assert row.id not in self.errors, "settled twice"
            self.errors[row.id] = outcome["error"]
            if outcome.get("unchanged"):
                self.unchanged.add(row.id)

        Fleet(Plan(0, 0, workers), folder, folder / "log.txt", self.decided.append).run(tasks, settle)
        assert len(self.errors) == len(rows)

    @property
    def sent(self) -> list[Json]:
        """All messages to all workers, with the worker's pid."""
        return [json.loads(line) for line in (self.folder / "sent").read_text().splitlines()]


def test_the_first_worker_decides_how_many_there_are_and_with_how_many_threads(tmp_path: Path) -> None:
    run = Run(tmp_path, *[("make", "small")] * 40)
    assert run.decided == [Plan(0, 3, 2)]
    assert len({message["pid"] for message in run.sent}) == 2
    assert set(run.errors.values()) == {None}


def test_a_second_process_starts_while_the_first_one_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("musicgen_svc.batch.processes.cores", lambda: 2)
    run = Run(tmp_path, *[("make", "patient")] * 40)
    assert len(list(tmp_path.glob("started *"))) == 2
    assert len({message["pid"] for message in run.sent}) == 2


def test_the_user_decides_how_many_workers_there_are(tmp_path: Path) -> None:
    run = Run(tmp_path, *[("make", "small")] * 40, workers=1)
    assert len({message["pid"] for message in run.sent}) == 1


def test_a_worker_has_as_many_rows_as_it_asked_for(tmp_path: Path) -> None:
    """These rows end in pairs, so a worker that is sent one at a time would wait for ever."""
    Run(tmp_path, *[("wait", "small")] * 6, workers=1)


def test_a_worker_finishes_one_model_before_the_next_and_each_is_loaded_once(tmp_path: Path) -> None:
    models = ["small", "melody", "encode-decode"] * 5
    run = Run(tmp_path, *[("make", model) for model in models], workers=1)
    assert [message["prepare"] for message in run.sent if "prepare" in message] == ["small", "melody"]
    order = [message["row"]["fields"]["model_version"] for message in run.sent if "row" in message]
    assert [model for model in order if model != "encode-decode"] == ["small"] * 5 + ["melody"] * 5


def test_a_resumed_job_loads_only_the_models_of_rows_that_have_changed(tmp_path: Path) -> None:
    """The model `broken` would end the worker."""
    done, changed = ("make", "broken", "same"), ("make", "small", "another")
    run = Run(tmp_path, *[done] * 20, changed, ("make", "small"), workers=1)
    assert [message["prepare"] for message in run.sent if "prepare" in message] == ["small"]
    assert run.unchanged == {str(number) for number in range(20)}
    assert [message["row"]["id"] for message in run.sent if "row" in message] == ["20", "21"]


def test_rows_of_a_worker_that_ended_are_run_again_one_at_a_time(tmp_path: Path) -> None:
    run = Run(tmp_path, ("die once", "small"), *[("make", "small")] * 6, workers=1)
    assert set(run.errors.values()) == {None}
    second = [message for message in run.sent if message["pid"] == run.sent[-1]["pid"]]
    assert [message["row"]["id"] for message in second[1:3]] == ["0", "1"]


def test_a_row_that_always_ends_its_worker_fails_alone(tmp_path: Path) -> None:
    run = Run(tmp_path, *[("make", "small")] * 5, ("die", "small"), *[("make", "small")] * 5)
    failed = {row: error for row, error in run.errors.items() if error}
    assert failed == {"5": "The worker process ended 3 times while it made this row; log.txt has the cause."}
    assert Counter(m["row"]["id"] for m in run.sent if "row" in m)["5"] == 3


def test_rows_of_a_model_that_does_not_load_are_sent_one_at_a_time_and_decide_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path, ("make", "large"), ("make", "large"), ("make", "small"))
    assert run.decided == [Plan(0, 3, 2)]
    assert set(run.errors.values()) == {None}


def test_workers_that_end_whenever_they_load_a_model_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match=r"ended 3 times before a model was loaded; .*log\.txt says why\.$"):
        Run(tmp_path, ("make", "broken"))
