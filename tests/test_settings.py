"""Settings come from the environment, once, and refuse what they cannot read."""

import dataclasses
from pathlib import Path

import pytest

from musicgen_svc.errors import ServiceError
from musicgen_svc.settings import Settings


def test_an_empty_environment_gives_the_defaults() -> None:
    assert Settings.from_environment({"MUSICGEN_DEVICE": ""}) == Settings()


def test_every_setting_is_read_in_its_own_type() -> None:
    environment = {
        "MUSICGEN_WEIGHTS_DIR": "/w", "MUSICGEN_DEVICE": "cuda:1", "MUSICGEN_MAX_DURATION_S": "30",
        "MUSICGEN_MAX_REQUEST_S": "12.5", "MUSICGEN_WORK_DIR": "/tmp/x", "MUSICGEN_OUTPUT_GRACE_S": "5",
        "MUSICGEN_DIFFUSION_WINDOW_S": "20", "MUSICGEN_TAG_PROMPT": "true",
        "MUSICGEN_CUDA_GRAPHS": "1", "MUSICGEN_LORA_STRENGTH": "0.5",
    }  # fmt: skip
    assert len(environment) == len(dataclasses.fields(Settings))
    expected = Settings(Path("/w"), "cuda:1", 30, 12.5, Path("/tmp/x"), 5.0, 20.0, 0.5, True, True)
    assert Settings.from_environment(environment) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [("MAX_DURATION_S", "ten"), ("MAX_REQUEST_S", "0"), ("MAX_DURATION_S", "-3"), ("TAG_PROMPT", "maybe")],
)
def test_what_cannot_be_read_is_named(name: str, value: str) -> None:
    with pytest.raises(ServiceError, match=f"MUSICGEN_{name} is '?{value}"):
        Settings.from_environment({f"MUSICGEN_{name}": value})
