"""What the service measures of itself, in Prometheus' format, and the HTTP server that answers with it.

Values of labels come from closed sets, so that no client can make the number of series grow. The server has
threads of its own: a scrape never waits for a request or for the event loop, and it calls nothing of CUDA.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    start_http_server,
)

from musicgen_svc.errors import DrainingError, InputError, ServiceError, Stopped

STAGE_BOUNDS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
"""Upper bounds of the histograms: up to the default of MUSICGEN_MAX_REQUEST_S."""
UNKNOWN = "unknown"


@dataclass
class MeasuredRequest:
    """What is known of one request when it ends."""

    mode: str = UNKNOWN
    """`unknown` if the request was refused before its fields were valid. So is `model`."""
    model: str = UNKNOWN
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    """Seconds of each stage; 0 for a stage that it did not have."""
    audio_seconds: float = 0.0
    """The length of its output."""
    steps: int = 0
    """How many steps of the engine it took."""


class Measurements:
    """The metrics of one service."""

    def __init__(self) -> None:
        """Makes metrics that are all zero."""
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = Counter(
            "musicgen_requests", "Requests that have ended, by their result.", ["mode", "model", "result"],
            registry=self.registry,
        )  # fmt: skip
        self._stages = Histogram(
            "musicgen_stage_seconds", "Time that one request spent in a stage.", ["stage"],
            buckets=STAGE_BOUNDS_S, registry=self.registry,
        )  # fmt: skip
        self._audio = Counter(
            "musicgen_audio_seconds", "Length of the audio of the requests that succeeded.",
            registry=self.registry,
        )  # fmt: skip
        self._steps = Counter(
            "musicgen_decoding_steps", "Decoding steps of the requests that succeeded, added when they end.",
            registry=self.registry,
        )  # fmt: skip

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Adds a metric that is computed at each scrape, on a thread of the server.

        Args:
            name: without the prefix `musicgen_`.
            text: explains the metric.
            value: must not wait.
        """
        Gauge(f"musicgen_{name}", text, registry=self.registry).set_function(value)

    def watch_models(self, names: tuple[str, ...], is_resident: Callable[[str], bool]) -> None:
        """Adds a metric for each model: whether it is in memory."""
        gauge = Gauge(
            "musicgen_model_resident", "Whether the model is in memory.", ["model"], registry=self.registry
        )
        for name in names:
            gauge.labels(name).set_function(partial(is_resident, name))

    def watch_device(self, device: torch.device) -> None:
        """Adds the memory of a GPU. On a CPU the memory is that of the process, which is always measured."""
        if device.type != "cuda":
            return
        total = torch.cuda.get_device_properties(device).total_memory
        # torch knows these without asking the driver, which could disturb the recording of a CUDA graph.
        self.watch("device_memory_bytes", "Memory of the GPU.", lambda: total)
        self.watch(
            "device_memory_reserved_bytes", "GPU memory that torch has reserved.",
            lambda: torch.cuda.memory_reserved(device),
        )  # fmt: skip
        self.watch(
            "device_memory_allocated_bytes", "GPU memory that tensors take.",
            lambda: torch.cuda.memory_allocated(device),
        )  # fmt: skip

    @contextmanager
    def request(self) -> Iterator[MeasuredRequest]:
        """Context manager of one request. The end of the block counts it, with what is then known of it."""
        request = MeasuredRequest()
        result = "failed"
        try:
            yield request
            result = "succeeded"
        except InputError:
            result = "refused"
            raise
        except DrainingError:
            result = "drained"
            raise
        except (Stopped, asyncio.CancelledError):
            result = "cancelled"
            raise
        finally:
            self._requests.labels(request.mode, request.model, result).inc()
            for stage, seconds in request.stage_seconds.items():
                if seconds > 0:
                    self._stages.labels(stage).observe(seconds)
            self._audio.inc(request.audio_seconds)
            self._steps.inc(request.steps)

    def serve(self, host: str, port: int) -> Callable[[], None]:
        """Starts a server that answers each GET with the metrics, on daemon threads.

        Returns:
            A function that stops the server.

        Raises:
            ServiceError: it cannot listen there.
        """
        try:
            server, thread = start_http_server(port, host, self.registry)
        except (OSError, OverflowError) as error:
            raise ServiceError(
                f"The metrics cannot be served at MUSICGEN_METRICS_HOST={host} MUSICGEN_METRICS_PORT={port} "
                f"({getattr(error, 'strerror', None) or error}): choose another port, or 0 for none."
            ) from None

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return stop
