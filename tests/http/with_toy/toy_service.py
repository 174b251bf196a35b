"""Replaces musicgen_svc/service.py in the checkout of toy.py. The prompt decides what happens."""

import asyncio
import os
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

from cog import current_scope

from musicgen_svc.errors import InputError, WeightsError
from musicgen_svc.settings import Settings


class Service:
    """Has the interface of the real service."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._healthy = True
        self._running = 0

    def start(self, weights: str | None) -> None:
        print(f"weights: {weights}")
        warnings.warn("ours", stacklevel=1)
        warnings.warn_explicit("theirs", UserWarning, "torch/nn.py", 1, module="torch.nn")
        if weights == "broken":
            raise WeightsError("COG_WEIGHTS is 'broken', where there is no state_dict.bin.")

    def healthy(self) -> bool:
        return self._healthy

    async def predict(
        self,
        fields: dict[str, object],
        record_metric: Callable[[str, object], None],
        given_up: Callable[[], bool],
        send_chunk: Callable[[dict[str, object]], None] | None,
    ) -> Path:
        self._running += 1
        try:
            return await self._predict(fields, record_metric, given_up)
        finally:
            self._running -= 1

    async def _predict(
        self,
        fields: dict[str, object],
        record_metric: Callable[[str, object], None],
        given_up: Callable[[], bool],
    ) -> Path:
        prompt = str(fields["prompt"])
        print(f"seed: {fields['seed']}")
        record_metric("seed", fields["seed"] if fields["seed"] is not None else 12345)
        folder = Path(tempfile.mkdtemp())
        if prompt == "refused":
            raise InputError("prompt is 'refused'; it must be another.")
        if prompt == "crash":
            os._exit(1)
        if prompt == "device lost":
            self._healthy = False
            raise InputError("The device is lost.")
        if prompt == "deadlock":
            stuck = threading.Lock()
            stuck.acquire()
            stuck.acquire()
        if prompt == "slow":  # starts a child process, and ends only by SIGKILL
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
            (folder / "half-written").touch()
            for percent in range(101):
                print(
                    f"\r{percent:3d}%|##        | generate [00:01<00:09]", end="", file=sys.stderr, flush=True
                )
                await asyncio.sleep(0.2 if percent < 20 else 60)  # no test waits for its end
        if prompt.startswith("until "):  # until this file exists
            (folder / "half-written").touch()
            while not Path(prompt.removeprefix("until ")).exists():
                await asyncio.sleep(0.05)
        if prompt == "metrics":
            record_metrics(record_metric)
        if prompt.endswith(" metrics"):
            for number in range(int(prompt.split()[0])):
                record_metric("number", number)
            print("recorded")
        if fields["duration"] == 600:  # until the client gives up
            while not given_up():
                await asyncio.sleep(0.05)
        record_metric("running", self._running)
        for name, seconds in {"load": 0.5, "generate": 1.25}.items():
            record_metric(name, seconds)
        record_metric("audio_seconds", fields["duration"])
        clip = fields["input_audio"]
        path = folder / f"out.{fields['output_format']}"
        path.write_bytes(clip.read_bytes() if isinstance(clip, Path) else b"RIFF" + prompt.encode())
        return path


def record_metrics(record_metric: Callable[[str, object], None]) -> None:
    """Does with metrics what tests of Cog ask about."""
    scope = current_scope()
    record_metric("context", dict(scope.context))
    record_metric("kept", {"a": 1})
    record_metric("deleted", {"b": 2})
    scope.metrics.delete("deleted")
    try:
        record_metric("kept", None)
    except TypeError as error:
        record_metric("refusal", f"TypeError: {error}")
