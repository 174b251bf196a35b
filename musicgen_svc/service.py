"""Runs predictions for `predict.py`: each waits for a slot, has a thread, and fails with one sentence."""

import asyncio
import contextvars
import threading
import traceback
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path

import torch

from musicgen_svc.backend import Backend, DeviceError
from musicgen_svc.errors import GenerationError, ServiceError, Stopped, WeightsError
from musicgen_svc.live import SendChunk
from musicgen_svc.loading.loader import Loader
from musicgen_svc.pipeline import Pipeline, Result, stage_shares
from musicgen_svc.request import LANGUAGE_MODELS, Mode, Request
from musicgen_svc.runtime.device import use_device
from musicgen_svc.runtime.draining import Drain
from musicgen_svc.runtime.failures import for_client, log_failure
from musicgen_svc.runtime.freed_memory import FreedMemory
from musicgen_svc.runtime.measurements import MeasuredRequest, Measurements
from musicgen_svc.runtime.output_files import WorkFolder
from musicgen_svc.runtime.progress import Log, Progress, StopFlag
from musicgen_svc.runtime.request_threads import RequestThreads
from musicgen_svc.runtime.ticks import Check
from musicgen_svc.runtime.waiting_room import POLL_S, WaitingRoom
from musicgen_svc.settings import Settings

RecordMetric = Callable[[str, object], None]
GivenUp = Callable[[], bool]
"""Tells whether Cog has given up a prediction that still runs here."""


class Service:
    """The service as `predict.py` uses it: `start` once, then `predict` for each request."""

    def __init__(self, settings: Settings) -> None:
        """Creates the work folder and the threads; loads no model."""
        self._settings = settings
        # Cog's event loop must not be blocked: one thread loads and checks, one for each slot runs requests.
        self._loading_thread = RequestThreads(1)
        self._threads = RequestThreads(0)
        self._room: WaitingRoom | None = None
        self._freed_memory = FreedMemory()
        self._work = WorkFolder(settings.work_dir)
        self._drain = Drain(settings.drain_file)
        self._measurements = Measurements()
        self._backend: Backend | None = None
        self._pipeline: Pipeline | None = None
        self._device = torch.device("cpu")
        self._device_failed = threading.Event()

    def start(self, weights: str | None) -> None:
        """Loads the model `finetuned`, and with it everything that a request needs.

        Args:
            weights: a path or URL of a checkpoint, as in COG_WEIGHTS; None: the one in the weights folder.

        Raises:
            ServiceError: a file is missing or wrong, or the device cannot be used.
        """
        try:
            self._loading_thread.run(partial(self._start, weights))
        except ServiceError as exc:
            _print_cause(exc)
            raise

    def _start(self, given: str | None) -> None:
        """Does the work of `start`, on the thread that loads."""
        if self._settings.metrics_port:  # first, so that a port that is taken costs no time
            self._measurements.serve(self._settings.metrics_host, self._settings.metrics_port)
        backend = self._backend = Backend.open(self._settings, given)
        self._device, self._pipeline, loader = backend.device, backend.pipeline, backend.loader
        with backend.device_queue.acquire_next():
            model = loader.start()
        self._room = WaitingRoom(loader.slots)
        self._threads = RequestThreads(loader.slots)
        self._watch(loader, self._room)
        waiting = self._settings.max_concurrency - loader.slots
        print(
            f"{model.name} is ready on {self._device}: {model.format} {model.path}. "
            f"Requests at once: {loader.slots}; more that may wait: {waiting}."
        )

    def _watch(self, loader: Loader, room: WaitingRoom) -> None:
        """Adds to the metrics what is read at each scrape."""
        measured = self._measurements
        measured.watch("queue_length", "Requests that wait for a slot.", lambda: room.waiting)
        measured.watch("slots_in_use", "Requests that run.", lambda: room.running)
        measured.watch("slots", "Requests that may run at once.", lambda: room.slots)
        measured.watch_models(LANGUAGE_MODELS, loader.in_memory)
        measured.watch_device(loader.device)

    def healthy(self) -> bool:
        """Returns False once the device has failed permanently. Never waits for the device."""
        return not self._device_failed.is_set()

    async def predict(
        self,
        fields: dict[str, object],
        record_metric: RecordMetric,
        given_up: GivenUp = lambda: False,
        send_chunk: SendChunk | None = None,
    ) -> Path:
        """Runs one prediction.

        Args:
            fields: the inputs by their names in the contract.
            record_metric: called with each metric of the result.
            given_up: whether Cog has given up this prediction.
            send_chunk: sends a chunk of audio while it is generated; None: nobody hears it. It is called on
                another thread.

        Returns:
            The output file. It is deleted after the grace period of the settings.

        Raises:
            ServiceError: with the sentence that the user reads.
            asyncio.CancelledError: the client cancelled; the request has released everything by then.
            Stopped: Cog gave the prediction up; nobody reads the outcome.
        """
        with self._measurements.request() as measured:
            return await self._predict(fields, record_metric, given_up, send_chunk, measured)

    async def _predict(
        self, fields: dict[str, object], record_metric: RecordMetric, given_up: GivenUp,
        send_chunk: SendChunk | None, measured: MeasuredRequest,
    ) -> Path:  # fmt: skip
        """Does the work of `predict`, and notes in `measured` what is known of the request."""
        request = Request.from_fields(fields, self._settings.max_duration_s)
        measured.mode, measured.model = request.mode.value, request.model
        self._drain.check()
        print(f"seed: {request.seed}")
        record_metric("seed", request.seed)
        stop = StopFlag(self._settings.max_request_s)

        def poll() -> None:
            # Cog gives up a prediction that is cancelled within its first millisecond: it answers the client,
            # but has started the prediction and will never cancel it. So the request has to ask.
            if given_up() and not stop.cancelled:
                print("Cog gave this prediction up, so it is stopped.")
                stop.cancel()

        log: Log = "json" if self._settings.log_format == "json" else "text"
        with Progress(stage_shares(request), stop, log) as progress:
            measured.stage_seconds = progress.seconds
            result = await self._in_slot(request, progress, stop, poll, send_chunk)
        measured.audio_seconds, measured.steps = result.audio_seconds, result.steps
        for name, value in result.metrics.items():
            record_metric(name, value)
        return result.path

    async def _in_slot(
        self, request: Request, progress: Progress, stop: StopFlag, poll: Check, send_chunk: SendChunk | None
    ) -> Result:
        """Waits for a slot and runs a request in it. `poll`: called every 0.5 s all the time."""
        assert self._pipeline and self._room, "call start() before predict()"
        group = None if request.mode is Mode.ENCODE_DECODE else request.model

        def on_wait(before: int) -> None:
            poll()
            stop.check()
            self._drain.check()
            progress.show_position(before)
            self._freed_memory.give_back()

        async with AsyncExitStack() as held:
            with progress.waiting():
                await self._in_thread(
                    self._loading_thread, partial(self._pipeline.check, request), stop, poll
                )
                await held.enter_async_context(self._room.slot(group, on_wait))
            stop.start_clock()
            folder, grace_s = self._work.new_request(), 0.0
            try:
                work = partial(self._pipeline.run, request, progress, folder, send_chunk)
                result = await self._in_thread(self._threads, work, stop, poll)
                grace_s = self._settings.output_grace_s
            finally:
                self._work.release(folder, grace_s)
        return result

    async def _in_thread[T](
        self, threads: RequestThreads, work: Callable[[], T], stop: StopFlag, poll: Check
    ) -> T:
        """Does a part of a request's work on a thread. After a cancel it waits until the thread is free."""
        # Cog assigns log lines to predictions by context variables, which a thread does not inherit.
        context = contextvars.copy_context()
        job, outcome = threads.submit(partial(context.run, self._guarded, work))
        try:
            while not (await asyncio.wait([outcome], timeout=POLL_S))[0]:
                poll()
            return outcome.result()
        except asyncio.CancelledError:
            stop.cancel()
            if not job.withdraw():
                while not outcome.done():
                    with suppress(asyncio.CancelledError):  # a cancel that is repeated
                        await asyncio.wait([outcome])
                outcome.exception()  # read it, or asyncio reports it as never retrieved
            raise

    def _guarded[T](self, work: Callable[[], T]) -> T:
        """Does work in the calling thread. Turns each error into one sentence and logs its cause."""
        try:
            use_device(self._device)
            return work()
        except Stopped:
            raise
        except ServiceError as exc:
            if exc.__cause__ is not None or isinstance(exc, WeightsError):  # else the sentence is enough
                log_failure(exc)
            raise for_client(exc) from None
        except Exception as exc:
            log_failure(exc)
            raise self._failure(exc) from None

    def _failure(self, exc: Exception) -> GenerationError:
        """Returns the sentence for an error that the service did not raise itself.

        Frees the memory after an out-of-memory error; marks the service as unhealthy if the device failed.
        """
        assert self._backend is not None
        failure = self._backend.failure(exc)
        if isinstance(failure, DeviceError):
            self._device_failed.set()
        return failure


def _print_cause(exc: ServiceError) -> None:
    """Prints the traceback of an error that has a cause. Without a cause its sentence is enough."""
    if exc.__cause__ is not None:
        traceback.print_exception(exc)
