"""Ids and seeds that rows get, and what of their values is settled before a worker has them."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from musicgen_svc.batch.job_file import JobError, WrittenRow
from musicgen_svc.batch.rows import Row, settle
from musicgen_svc.cli.schema_fields import fields
from tests.cli.repository import SCHEMA

DEFAULTS = {name: field.get("default") for name, field in (fields(SCHEMA) or {}).items()}
WALTZ = {"prompt": "a waltz"}


def settled(*rows: Mapping[str, object], seed: int = 0, folder: Path = Path("/jobs")) -> list[Row]:
    written = [
        WrittenRow(
            number, str(row["id"]) if "id" in row else None, {k: v for k, v in row.items() if k != "id"}
        )
        for number, row in enumerate(rows, 1)
    ]
    return settle(written, defaults=DEFAULTS, folder=folder, seed=seed, max_duration_s=600)


def test_the_id_of_a_row_without_one_depends_on_its_values_and_its_occurrence_alone() -> None:
    first, other, again = settled(WALTZ, {"prompt": "a reel"}, WALTZ)
    assert len({first.id, other.id, again.id}) == 3
    assert [row.id for row in settled({"prompt": "a march"}, WALTZ, WALTZ)[1:]] == [first.id, again.id]
    assert settled({"prompt": "a waltz", "duration": 8})[0].id == first.id, "a default is no other value"


def test_an_id_that_another_row_would_get_is_refused() -> None:
    with pytest.raises(JobError, match="The row in line 2 has no id and would get"):
        settled({"id": settled(WALTZ)[0].id, "prompt": "a reel"}, WALTZ)


def test_the_seed_of_a_row_without_one_depends_on_its_id_and_on_the_jobs_seed_alone() -> None:
    rows = settled({"id": "a", **WALTZ}, {"id": "b", **WALTZ}, {"id": "c", "seed": -1, **WALTZ})
    seeds = [row.fields["seed"] for row in rows]
    assert len(set(seeds)) == 3 and all(isinstance(seed, int) and 0 <= seed < 2**32 for seed in seeds)
    assert settled({"id": "c", "prompt": "a reel"})[0].fields["seed"] == seeds[2]
    assert settled({"id": "a", **WALTZ}, seed=1)[0].fields["seed"] != seeds[0]
    assert settled({"id": "a", "seed": 0, **WALTZ})[0].fields["seed"] == 0


def test_values_are_recorded_as_they_are_used() -> None:
    (row,) = settled(
        {"prompt": "  ", "input_audio": "a.wav", "duration": 2.0, "continuation_end": -1, "top_k": 2**40}
    )
    assert row.error is None
    used = {
        name: row.fields[name] for name in ("prompt", "duration", "continuation_end", "top_k", "temperature")
    }
    assert used == {
        "prompt": None,
        "duration": 2,
        "continuation_end": None,
        "top_k": 2**31 - 1,
        "temperature": 1,
    }
    assert row.fields.keys() == DEFAULTS.keys()


def test_clips_are_paths_relative_to_the_job_file_or_urls() -> None:
    clips = [
        row.clip for row in settled(*({"input_audio": clip} for clip in ("a.wav", "/b.wav", "HTTPS://c/d")))
    ]
    assert clips == ["/jobs/a.wav", "/b.wav", "HTTPS://c/d"]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": "a waltz", "duration": "long"}, "duration is 'long'; it must be a number."),
        ({"prompt": "a waltz", "duration": 601}, "duration is 601; it must be between 1 and 600."),
        ({"prompt": "a waltz", "continuation": 1}, "continuation is 1; it must be true or false."),
        ({"prompt": "a waltz", "seed": 2**32}, "seed is 4294967296; it must be between -1 and 4294967295."),
        (
            {"prompt": "a waltz", "model_version": "tiny"},
            "model_version is 'tiny'; it must be one of melody, ",
        ),
        ({"input_audio": 3}, "input_audio is 3; it must be a path or an http(s) URL of an audio file."),
        ({}, "prompt and input_audio are both missing: give at least one of them."),
    ],
)
def test_a_row_that_is_no_request_has_the_services_sentence(row: dict[str, object], sentence: str) -> None:
    (refused,) = settled(row)
    assert refused.error and refused.error.startswith(sentence)
    assert refused.generated_s == 0
