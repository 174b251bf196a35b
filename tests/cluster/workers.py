"""What the tests run in Ray's processes: a task, and a worker that makes nothing and may end."""

import os
import time
from typing import Any

from musicgen_svc.batch.cluster_workers import ClusterWorker, Places
from musicgen_svc.batch.work import Plan

Json = dict[str, Any]


class DyingWorker(ClusterWorker):
    """Ends its process at the prompt `die`; other rows last long enough to be lost with it."""

    def __init__(self, plan: Plan, model: str, attempts: Any) -> None:
        """Loads nothing."""
        self.fault = None
        self._attempts = attempts
        self._two = Places(2)

    def prepare(self) -> Places:
        """Loads nothing."""
        return self._two

    def _run(self, task: Json) -> Json:
        """Makes nothing."""
        time.sleep(0.2)
        if task["fields"]["prompt"] == "die":
            os._exit(1)
        return {"error": None}


def process_id() -> int:
    """The process in which a task runs."""
    return os.getpid()
