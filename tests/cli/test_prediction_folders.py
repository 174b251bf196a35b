"""Cog's folders of predictions: which are removed and when, and what is checked at the start."""

from pathlib import Path

import pytest

from musicgen_svc.cli.prediction_folders import PredictionFolders, UnusableFolderError, check
from musicgen_svc.cli.reaper import Reaper


def test_an_id_leads_to_no_other_folder(tmp_path: Path) -> None:
    """Clients choose ids. Cog makes folders of them, which are removed here."""
    root = tmp_path / "coglet" / "predictions"
    for path in (root / "mine", root / "anothers", tmp_path / "coglet" / "other"):
        path.mkdir(parents=True)
    reaper = Reaper()
    folders = PredictionFolders(reaper, root)
    for id in ("mine", "..", ".", "../other", "", "/"):
        folders.started(id)
        folders.finished(id)
    reaper.reap()
    assert [path.name for path in root.iterdir()] == ["anothers"]
    assert (tmp_path / "coglet" / "other").is_dir()


def test_a_folder_goes_when_its_prediction_has_ended_and_no_request_is_on_its_way(tmp_path: Path) -> None:
    reaper = Reaper()
    folders = PredictionFolders(reaper, tmp_path)
    for order in (("answered", "finished"), ("finished", "answered")):
        folder = tmp_path / "one"
        folder.mkdir()
        folders.requested("one")
        folders.started("one")
        getattr(folders, order[0])("one")
        assert folder.is_dir()
        getattr(folders, order[1])("one")
        assert not folder.exists()
    (tmp_path / "left").mkdir()
    folders.started("left")
    reaper.reap()
    assert not (tmp_path / "left").exists(), "what is left goes with the server"


def test_a_folder_of_cogs_that_is_somebody_elses_is_told_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise every prediction would occupy a slot for ever."""
    root = tmp_path / "coglet" / "predictions"
    check(root)
    assert list(root.iterdir()) == []

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(
        UnusableFolderError, match=r"^Cog cannot write to .*predictions \(Permission denied\)"
    ):
        check(root)
