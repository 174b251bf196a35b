"""Settings are read from the environment, and values that cannot be parsed are refused."""

import dataclasses
from pathlib import Path
from typing import get_args

import pytest

from musicgen_svc.engine.projections import Precision
from musicgen_svc.errors import ServiceError
from musicgen_svc.settings import Settings


def test_an_empty_environment_gives_the_defaults() -> None:
    assert Settings.from_environment({"MUSICGEN_DEVICE": ""}) == Settings()


def test_every_setting_is_read_in_its_own_type() -> None:
    environment = {
        "MUSICGEN_WEIGHTS_DIR": "/w", "MUSICGEN_DEVICE": "cuda:1", "MUSICGEN_MAX_DURATION_S": "30",
        "MUSICGEN_MAX_REQUEST_S": "12.5", "MUSICGEN_WORK_DIR": "/tmp/x", "MUSICGEN_OUTPUT_GRACE_S": "5",
        "MUSICGEN_DIFFUSION_WINDOW_S": "20", "MUSICGEN_TAG_PROMPT": "true", "MUSICGEN_PRECISION": "bfloat16",
        "MUSICGEN_CUDA_GRAPHS": "on", "MUSICGEN_LORA_STRENGTH": "0.5", "COG_MAX_CONCURRENCY": "4",
        "MUSICGEN_MEMORY_BUDGET_GB": "7.5", "MUSICGEN_WEIGHTS_HOSTS": "a.org,b.org",
        "MUSICGEN_WEIGHTS_MAX_GB": "1.5", "MUSICGEN_GPU_KERNELS": "auto", "MUSICGEN_SLOTS": "3",
        "OMP_NUM_THREADS": "2", "MUSICGEN_DRAIN_FILE": "/tmp/drain", "MUSICGEN_DRAIN_GRACE_S": "60",
        "LOG_FORMAT": "json", "MUSICGEN_METRICS_PORT": "9100", "MUSICGEN_METRICS_HOST": "0.0.0.0",
    }  # fmt: skip
    assert len(environment) == len(dataclasses.fields(Settings))
    expected = Settings(
        Path("/w"),
        "cuda:1",
        30,
        12.5,
        Path("/tmp/x"),
        5.0,
        20.0,
        0.5,
        "bfloat16",
        "on",
        "auto",
        True,
        3,
        4,
        "2",
        7.5,
        "a.org,b.org",
        1.5,
        Path("/tmp/drain"),
        60.0,
        9100,
        "0.0.0.0",
        "json",
    )
    assert Settings.from_environment(environment) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MAX_DURATION_S", "ten"),
        ("MAX_REQUEST_S", "0"),
        ("MAX_DURATION_S", "-3"),
        ("TAG_PROMPT", "maybe"),
        ("PRECISION", "int4"),
        ("MEMORY_BUDGET_GB", "-1"),
        ("MEMORY_BUDGET_GB", "inf"),
        ("MAX_REQUEST_S", "nan"),
    ],
)
def test_a_value_that_cannot_be_parsed_is_named(name: str, value: str) -> None:
    with pytest.raises(ServiceError, match=f"MUSICGEN_{name} is '?{value}"):
        Settings.from_environment({f"MUSICGEN_{name}": value})


def test_a_default_of_zero_may_be_written_out() -> None:
    assert Settings.from_environment({"MUSICGEN_MEMORY_BUDGET_GB": "0"}) == Settings()


def test_the_precisions_are_those_of_the_engine() -> None:
    choice = next(field for field in dataclasses.fields(Settings) if field.name == "precision")
    assert choice.metadata["choices"] == get_args(Precision)


def test_cogs_own_variable_is_named_by_its_own_name() -> None:
    with pytest.raises(ServiceError, match="COG_MAX_CONCURRENCY is 'many'"):
        Settings.from_environment({"COG_MAX_CONCURRENCY": "many"})
