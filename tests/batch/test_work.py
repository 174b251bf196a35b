"""The order in which tasks are taken."""

from musicgen_svc.batch.rows import Row
from musicgen_svc.batch.work import Task, TaskQueue


def tasks(*models: str) -> list[Task]:
    return [
        Task(Row(f"{model} {number}", {"model_version": model}, None, None), None)
        for number, model in enumerate(models)
    ]


def taken(queue: TaskQueue, model: str | None, *, busy: bool) -> str | None:
    task = queue.take(model, busy=busy)
    return task and task.row.model


def test_a_model_is_followed_by_the_next_one_only_when_its_requests_have_ended() -> None:
    queue = TaskQueue(tasks("small", "large", "small"))
    assert taken(queue, None, busy=False) == "small"
    assert taken(queue, "small", busy=True) == "small"
    assert taken(queue, "small", busy=True) is None
    assert taken(queue, "small", busy=False) == "large"
    assert len(queue) == 0


def test_encode_decode_runs_beside_the_last_requests_of_a_model() -> None:
    queue = TaskQueue(tasks("encode-decode", "small", "encode-decode", "large"))
    assert taken(queue, None, busy=False) == "small"
    assert taken(queue, "small", busy=True) == "encode-decode"
    assert taken(queue, "small", busy=False) == "large"
    assert taken(queue, "large", busy=True) == "encode-decode"


def test_one_worker_loads_each_model_once() -> None:
    lists = TaskQueue(tasks("encode-decode", "small", "large", "small")).by_model()
    assert [[task.row.model for task in group] for group in lists] == [
        ["small", "small"],
        ["large", "encode-decode"],
    ]
    assert len(TaskQueue(tasks("encode-decode", "encode-decode")).by_model()) == 1
    assert TaskQueue([]).by_model() == []
