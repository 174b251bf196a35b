"""Runs rows of a job in one process: the engine's slots are shared by the rows that run at the same time."""

import math
import os
import resource
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import soundfile
import torch

from musicgen_svc.audio.loudness import measure_lufs
from musicgen_svc.backend import Backend, DeviceError
from musicgen_svc.batch.clips import clip_hash, local_clip
from musicgen_svc.batch.work import ENCODE_DECODE, STAGES, Capacity
from musicgen_svc.errors import ServiceError
from musicgen_svc.loading.contents import CODEC, DECODER, SEPARATOR, TEXT
from musicgen_svc.pipeline import stage_shares
from musicgen_svc.request import Mode, Request
from musicgen_svc.runtime.device import use_device
from musicgen_svc.runtime.freed_memory import FreedMemory
from musicgen_svc.runtime.machine import cores, memory_bytes
from musicgen_svc.runtime.progress import Progress, StopFlag
from musicgen_svc.runtime.threads import use_threads
from musicgen_svc.settings import Settings

Json = dict[str, Any]

NO_LIMIT = 1_000
"""More requests than any device decodes at once: the runner decides how many it sends."""
GROWTH = 1.25
"""How much more memory a worker may take later than after it has loaded a model."""


class Worker:
    """Runs rows. Its `run` may be called from several threads, for rows of one model at a time."""

    def __init__(self, slots: int, threads: int) -> None:
        """Makes a worker that has loaded no model, with the settings of the environment.

        Args:
            slots: of the engine; 0: what the settings say.
            threads: for the computations of one row on a CPU; 0: what the first model wants.

        Raises:
            ServiceError: a setting or a file is wrong, or the device cannot be used.
        """
        settings = Settings.from_environment(os.environ)
        self._settings = replace(settings, slots=slots or settings.slots, max_concurrency=NO_LIMIT)
        self._backend = Backend.open(self._settings, os.environ.get("COG_WEIGHTS") or None)
        self._freed_memory = FreedMemory()
        self._threads = threads
        if threads:
            self._backend.loader.threads.fix(threads)

    def prepare(self, name: str) -> Json | None:
        """Loads a model, and finds out what can be run at once with it.

        Returns:
            The fields of a `Capacity`; None: the model does not load, as each of its rows will report.
        """
        use_device(self._backend.device)
        try:
            independent = self._load(name)
        except ServiceError:
            return None
        device, slots = self._backend.device, self._backend.loader.slots
        return asdict(
            Capacity(
                device=str(device),
                threads=self._threads,
                # beyond the slots: rows whose clip is read, or whose tokens are decoded and written
                rows=slots + max(1, slots // 4) if independent else 1,
                workers=self._gpus() if device.type == "cuda" else self._processes(),
            )
        )

    def _load(self, name: str) -> bool:
        """Loads a model, and returns whether its rows may run together: on a CPU, if no bit changes."""
        loader, independent = self._backend.loader, True
        use_threads(loader.threads.most)
        with self._backend.device_queue.acquire_next():
            if name == ENCODE_DECODE:
                wanted = loader.threads.for_model(loader.codec()[1].parameter_count)
            else:
                model = loader.model(name)
                wanted = model.threads
                independent = self._backend.device.type == "cuda" or model.engine.decoder.rows_are_independent
        if not self._threads:
            self._threads = wanted
            loader.threads.fix(wanted)
        return independent

    def _gpus(self) -> int:
        """Returns how many GPUs there are, or 1 if the settings name one."""
        return torch.cuda.device_count() if self._settings.device in ("auto", "cuda") else 1

    def _processes(self) -> int:
        """Returns how many processes like this one the machine's cores and memory allow."""
        own_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return max(1, min(cores() // self._threads, int(memory_bytes() / (GROWTH * own_bytes))))

    def unchanged(self, task: Json, folder: Path) -> bool:
        """Returns whether a row's file, which an earlier run has made, would become the same. Loads no model.

        Args:
            task: as `Task.message` makes it. What the row was made of then is its `known`.
            folder: where a clip is fetched to.
        """
        use_device(self._backend.device)
        try:
            with self._opened(task, folder) as request:
                return bool(task["known"] == self._made_of(request))
        except ServiceError:
            return False  # making the row will fail, too, and report it

    def run(self, task: Json, folder: Path) -> Json:
        """Makes the file of one row.

        Args:
            task: as `Task.message` makes it.
            folder: where files go.

        Returns:
            The outcome: `error`, and if that is None also `file` and what was measured.

        Raises:
            DeviceError: this process can run nothing any more.
        """
        use_device(self._backend.device)
        use_threads(self._backend.loader.threads.most)
        try:
            with self._opened(task, folder) as request:
                self._backend.pipeline.check(request)
                return self._made_of(request) | self._made(request, folder)
        except ServiceError as exc:
            if exc.__cause__ is not None:
                traceback.print_exception(exc)
            return {"error": str(exc)}
        except Exception as exc:
            traceback.print_exception(exc)
            failure = self._backend.failure(exc)
            if isinstance(failure, DeviceError):
                raise failure from exc
            return {"error": str(failure)}
        finally:
            self._freed_memory.give_back()  # thousands of rows would otherwise spread it over many heaps

    @contextmanager
    def _opened(self, task: Json, folder: Path) -> Iterator[Request]:
        """Context manager that gives the request of a row, whose clip is a file meanwhile.

        Raises:
            InputError: the clip cannot be fetched, or the row is no request.
        """
        with tempfile.TemporaryDirectory(dir=folder) as own:
            clip = local_clip(task["clip"], Path(own)) if task["clip"] else None
            yield Request.from_fields(task["fields"] | {"input_audio": clip}, self._settings.max_duration_s)

    def _made(self, request: Request, folder: Path) -> Json:
        """Makes the file of a request. Returns the outcome without what it is made of."""
        with Progress(stage_shares(request), StopFlag(math.inf), "none") as progress:
            result = self._backend.pipeline.run(request, progress, folder)
        measured = {f"{stage}_s": result.stage_seconds[stage] for stage in STAGES}
        return {
            "error": None,
            "file": str(result.path),
            "device": str(self._backend.device),
            "threads": self._threads,
            "precision": self._settings.precision,
            "audio_s": result.audio_seconds,
            "loudness_lufs": _loudness(result.path),
            **measured,
        }

    def _made_of(self, request: Request) -> Json:
        """Returns the hashes of a request's clip, and of the files that its model and parts are loaded from.

        Raises:
            WeightsError: some of them are missing or damaged.
        """
        loader, generates = self._backend.loader, request.mode is not Mode.ENCODE_DECODE
        needed = [CODEC, *([TEXT] if generates else [])]
        if request.mode is Mode.MELODY:
            needed.append(SEPARATOR)
        if request.multi_band_diffusion:
            needed.append(DECODER)
        with self._backend.device_queue.acquire_next():
            model, parts = loader.contents.files(
                request.model if generates else loader.codec_model(), tuple(needed)
            )
        contents = loader.contents
        return {
            "model_sha256": contents.sha256(model) if generates else None,
            "parts_sha256": contents.sha256(parts),
            "clip_sha256": clip_hash(request.input_audio) if request.input_audio else None,
        }


def _loudness(path: Path) -> float | None:
    """Measures the loudness of a file in LUFS; None: it is silent."""
    samples, sample_rate = soundfile.read(path, dtype="float32", always_2d=True)
    lufs = measure_lufs(torch.from_numpy(samples.T), sample_rate)
    return lufs if math.isfinite(lufs) else None
