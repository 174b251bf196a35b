"""The folder of outputs: what survives a kill, and what a later run takes over."""

import json
from pathlib import Path
from typing import Any

import pytest

from musicgen_svc.batch.folder import open_folder
from musicgen_svc.batch.job_file import JobError
from musicgen_svc.batch.rows import Row

MADE = {"error": None, "model_sha256": "m", "audio_s": 1.0}


def row(name: str, **fields: Any) -> Row:
    return Row(
        name, {"prompt": "a waltz", "output_format": "wav", "model_version": "small", **fields}, None, None
    )


def finish(path: Path, made: Row, outcome: dict[str, Any] = MADE, content: str = "audio") -> None:
    """A run that finishes one row and is then killed."""
    with open_folder(path) as folder:
        audio = folder.unfinished / "audio"
        audio.write_text(content)
        folder.finish(made, outcome, None if outcome["error"] else audio)


def test_a_row_is_known_until_its_inputs_change_or_its_file_is_gone(tmp_path: Path) -> None:
    finish(tmp_path, row("a"))
    with open_folder(tmp_path) as folder:
        known = folder.known(row("a"))
        assert known and known["model_sha256"] == "m" and known["clip_sha256"] is None
        assert folder.known(row("a", prompt="a reel")) is None
        assert folder.known(row("b")) is None
        (tmp_path / "a.wav").unlink()
        assert folder.known(row("a")) is None


def test_a_line_that_was_written_in_part_costs_that_line_only(tmp_path: Path) -> None:
    finish(tmp_path, row("a"))
    finish(tmp_path, row("b"))
    part = tmp_path / "results" / "run-000002.jsonl"
    part.write_bytes(part.read_bytes()[:-1])
    finish(tmp_path, row("c"))
    with open_folder(tmp_path) as folder:
        assert [bool(folder.known(row(name))) for name in "abc"] == [True, False, True]


def test_merging_keeps_the_last_line_of_each_row_in_the_jobs_order(tmp_path: Path) -> None:
    for name, seed in (("other", 0), ("a", 1), ("b", 2), ("a", 3)):
        finish(tmp_path, row(name, seed=seed))
    with open_folder(tmp_path) as folder:
        merged = folder.merge([row("b"), row("a"), row("never")])
    lines = [json.loads(text) for text in merged.read_text().splitlines()]
    assert [(line["id"], line["seed"]) for line in lines] == [("b", 2), ("a", 3), ("other", 0)]
    assert list((tmp_path / "results").iterdir()) == [merged]


def test_a_run_that_was_killed_while_merging_has_lost_nothing(tmp_path: Path) -> None:
    """The merged file is there, and so are the files that it was merged from."""
    finish(tmp_path, row("a"))
    part = tmp_path / "results" / "run-000001.jsonl"
    content = part.read_bytes()
    with open_folder(tmp_path) as folder:
        folder.merge([row("a")])
    part.write_bytes(content)
    with open_folder(tmp_path) as folder:
        assert folder.known(row("a"))
        assert len(folder.merge([row("a")]).read_text().splitlines()) == 1


def test_another_format_replaces_the_file(tmp_path: Path) -> None:
    finish(tmp_path, row("a"))
    finish(tmp_path, row("a", output_format="mp3"))
    assert [path.name for path in tmp_path.glob("a.*")] == ["a.mp3"]


def test_a_failure_removes_the_file_of_other_inputs_and_keeps_that_of_the_same(tmp_path: Path) -> None:
    """A row can fail because of a setting, and its file must survive that."""
    failed = {"error": "It failed."}
    finish(tmp_path, row("same"))
    finish(tmp_path, row("same"), failed)
    assert (tmp_path / "same.wav").exists()
    finish(tmp_path, row("changed"))
    finish(tmp_path, row("changed", prompt="a reel"), failed)
    assert not (tmp_path / "changed.wav").exists()
    with open_folder(tmp_path) as folder:
        assert folder.known(row("same")) is None, "a failed row is tried again"


def test_every_line_has_the_same_columns(tmp_path: Path) -> None:
    finish(tmp_path, row("a"))
    finish(tmp_path, row("b"), {"error": "It failed."})
    with open_folder(tmp_path) as folder:
        lines = folder.merge([]).read_text().splitlines()
    assert json.loads(lines[0]).keys() == json.loads(lines[1]).keys()


def test_one_run_at_a_time_writes_the_folder(tmp_path: Path) -> None:
    with (
        open_folder(tmp_path),
        pytest.raises(JobError, match="is in use by another run"),
        open_folder(tmp_path),
    ):
        pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(JobError, match=r"file/out cannot be written \(Not a directory\)"),
        open_folder(tmp_path / "file" / "out"),
    ):
        pass
