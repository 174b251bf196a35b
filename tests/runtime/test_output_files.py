"""Outputs are kept as long as Cog needs them and no longer; files of others are never removed."""

import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from musicgen_svc.errors import GenerationError
from musicgen_svc.runtime.output_files import WorkFolder


def test_a_released_folder_is_removed_after_its_grace_period_and_no_other(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path)
    mine, neighbour = work.new_request(), work.new_request()
    (mine / "a.wav").touch()
    (neighbour / "b.wav").touch()
    start = time.monotonic()
    work.release(mine, after_s=0.5)
    while mine.exists():
        assert time.monotonic() - start < 60
        time.sleep(0.02)
    assert time.monotonic() - start >= 0.5
    assert (neighbour / "b.wav").exists()
    work.remove()
    assert list(tmp_path.iterdir()) == []


def _die_without_cleaning(parent: Path) -> None:
    (WorkFolder(parent).new_request() / "left.wav").touch()
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_folder_of_a_killed_server_is_removed_when_the_next_one_starts(tmp_path: Path) -> None:
    (tmp_path / "musicgen-not-ours").mkdir()
    alive = WorkFolder(tmp_path)
    kept = alive.new_request()
    process = multiprocessing.get_context("spawn").Process(target=_die_without_cleaning, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.glob("*/*/left.wav"))) == 1
    successor = WorkFolder(tmp_path)
    assert list(tmp_path.glob("*/*/left.wav")) == []
    assert kept.is_dir() and (tmp_path / "musicgen-not-ours").is_dir()
    for work in (alive, successor):
        work.remove()


def test_a_removal_that_is_killed_leaves_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the lock the next server recognizes the rest of the folder."""
    dying = WorkFolder(tmp_path)
    (dying.new_request() / "left.wav").touch()
    removed: list[Path] = []

    def remove(path: Path, ignore_errors: bool) -> None:
        assert path.is_dir()
        removed.append(path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("musicgen_svc.runtime.output_files.shutil.rmtree", remove)
        dying.remove()
    assert [path.parent.parent for path in removed] == [tmp_path]
    dying._lock.close()  # as the end of the process does
    WorkFolder(tmp_path).remove()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_deleted_is_created_again(tmp_path: Path) -> None:
    """systemd deletes files in /tmp that are ten days old."""
    work = WorkFolder(tmp_path / "outputs")
    shutil.rmtree(tmp_path / "outputs")
    assert work.new_request().is_dir()
    WorkFolder(tmp_path / "outputs").remove()
    assert len(list((tmp_path / "outputs").iterdir())) == 1, "the new folder is not locked"
    shutil.rmtree(tmp_path / "outputs")
    (tmp_path / "outputs").touch()
    with pytest.raises(GenerationError, match=r"cannot write its output files \(.+\); see MUSICGEN_WORK_DIR"):
        work.new_request()
    work.remove()
