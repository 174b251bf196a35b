"""Metrics add up to what requests did, and can be read over HTTP by Prometheus' own parser."""

import asyncio
import socket
import urllib.request
from collections.abc import Iterator

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from musicgen_svc.errors import (
    AudioError,
    DrainingError,
    GenerationError,
    InputError,
    ServiceError,
    Stopped,
    WeightsError,
)
from musicgen_svc.runtime.measurements import STAGE_BOUNDS_S, Measurements
from musicgen_svc.settings import Settings


@pytest.fixture
def measurements() -> Measurements:
    return Measurements()


def value(measurements: Measurements, name: str, **labels: str) -> float:
    """The value of a series; 0 if there is none."""
    return measurements.registry.get_sample_value(name, labels) or 0.0


@pytest.mark.parametrize(
    ("error", "result"),
    [
        (None, "succeeded"),
        (InputError("seed is 'x'; no."), "refused"),
        (AudioError("input_audio is no audio."), "refused"),
        (GenerationError("The device ran out of memory."), "failed"),
        (WeightsError("weights are missing."), "failed"),
        (RuntimeError("a bug"), "failed"),
        (DrainingError(), "drained"),
        (Stopped(), "cancelled"),
        (asyncio.CancelledError(), "cancelled"),
    ],
)
def test_a_request_is_counted_once_by_its_result(
    measurements: Measurements, error: BaseException | None, result: str
) -> None:
    def run() -> None:
        with measurements.request() as request:
            request.mode, request.model = "text", "small"
            if error is not None:
                raise error

    if error is None:
        run()
    else:
        with pytest.raises(type(error)):
            run()
    series = [
        (sample.labels, sample.value)
        for metric in measurements.registry.collect()
        for sample in metric.samples
        if sample.name == "musicgen_requests_total"
    ]
    assert series == [({"mode": "text", "model": "small", "result": result}, 1.0)]


def test_a_request_whose_fields_are_wrong_has_unknown_labels(measurements: Measurements) -> None:
    error = InputError("model_version is 'no such model', which a client made up.")
    with pytest.raises(InputError), measurements.request():
        raise error
    labels = {"mode": "unknown", "model": "unknown", "result": "refused"}
    assert value(measurements, "musicgen_requests_total", **labels) == 1


def test_stages_audio_and_steps_add_up(measurements: Measurements) -> None:
    for seconds in (0.2, 0.04):
        with measurements.request() as request:
            request.stage_seconds = {"load": 0.0, "generate": seconds}
            request.audio_seconds, request.steps = 8.0, 400
    assert value(measurements, "musicgen_stage_seconds_count", stage="generate") == 2
    assert value(measurements, "musicgen_stage_seconds_sum", stage="generate") == pytest.approx(0.24)
    assert value(measurements, "musicgen_stage_seconds_bucket", stage="generate", le="0.05") == 1
    assert value(measurements, "musicgen_stage_seconds_count", stage="load") == 0, "it had no such stage"
    assert value(measurements, "musicgen_audio_seconds_total") == 16
    assert value(measurements, "musicgen_decoding_steps_total") == 800


def test_the_bounds_reach_from_a_short_stage_to_the_longest_request() -> None:
    assert STAGE_BOUNDS_S[0] == 0.05 and STAGE_BOUNDS_S[-1] == Settings().max_request_s
    assert list(STAGE_BOUNDS_S) == sorted(STAGE_BOUNDS_S)


def test_what_is_watched_is_read_at_each_scrape(measurements: Measurements) -> None:
    waiting = 3
    in_memory = {"small"}
    measurements.watch("queue_length", "Requests that wait.", lambda: waiting)
    measurements.watch_models(("small", "melody"), lambda name: name in in_memory)
    assert value(measurements, "musicgen_queue_length") == 3
    waiting, in_memory = 4, {"melody"}
    assert value(measurements, "musicgen_queue_length") == 4
    assert value(measurements, "musicgen_model_resident", model="small") == 0
    assert value(measurements, "musicgen_model_resident", model="melody") == 1


def test_a_gpu_has_its_memory_measured_without_a_call_of_its_driver(
    measurements: Measurements, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Properties:
        total_memory = 80e9

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    measurements.watch_device(torch.device("cuda", 1))
    monkeypatch.setattr(torch.cuda, "get_device_properties", None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20e9 + device.index)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10e9 + device.index)
    assert value(measurements, "musicgen_device_memory_bytes") == 80e9
    assert value(measurements, "musicgen_device_memory_reserved_bytes") == 20e9 + 1
    assert value(measurements, "musicgen_device_memory_allocated_bytes") == 10e9 + 1


@pytest.fixture
def port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        found: int = taken.getsockname()[1]
    yield found


def test_the_metrics_are_read_over_http_and_the_port_is_free_again(
    measurements: Measurements, port: int
) -> None:
    with measurements.request():
        pass
    for _ in range(2):
        stop = measurements.serve("127.0.0.1", port)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as response:
            families = list(text_string_to_metric_families(response.read().decode()))
        assert any(
            sample.name == "musicgen_requests_total" and sample.value == 1
            for family in families
            for sample in family.samples
        )
        stop()


def test_a_port_that_is_taken_is_one_sentence(measurements: Measurements) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServiceError, match=rf"MUSICGEN_METRICS_PORT={port} .Address already in use.: "):
            measurements.serve("127.0.0.1", port)
    with pytest.raises(ServiceError, match=r"MUSICGEN_METRICS_PORT=70000 .*must be 0-65535"):
        measurements.serve("127.0.0.1", 70000)
    with pytest.raises(ServiceError, match=r"MUSICGEN_METRICS_HOST=nowhere\.invalid "):
        measurements.serve("nowhere.invalid", port)
