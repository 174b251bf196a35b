"""Files are compared by their bytes, and each is read at most once."""

import hashlib
import os
from pathlib import Path

import pytest

from musicgen_svc.loading import file_hashes
from musicgen_svc.loading.file_hashes import FileState, Hashes


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were hashed."""
    names: list[str] = []

    def counted(path: Path) -> str:
        names.append(path.name)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(file_hashes, "sha256_of", counted)
    return names


def write(path: Path, content: bytes) -> FileState:
    """Writes a file and returns its state."""
    path.write_bytes(content)
    return FileState.of(path)


def test_files_with_equal_bytes_are_equal_in_any_folder(tmp_path: Path, read: list[str]) -> None:
    hashes = Hashes()
    a, b, c = (write(tmp_path / n, content) for n, content in (("a", b"one"), ("b", b"one"), ("c", b"two")))
    assert hashes.equal([a], [b]) and not hashes.equal([a], [c])
    assert hashes.equal([a, c], [b, c]) and not hashes.equal([a, c], [c, a])
    assert sorted(read) == ["a", "b", "c"], "each once"


def test_files_of_different_sizes_and_the_same_file_are_not_read(tmp_path: Path, read: list[str]) -> None:
    a, longer = write(tmp_path / "a", b"one"), write(tmp_path / "b", b"longer")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    os.link(tmp_path / "a", tmp_path / "hard")
    hashes = Hashes()
    assert not hashes.equal([a], [longer]) and not hashes.equal([a], [a, a])
    assert hashes.equal([a], [FileState.of(tmp_path / "link")])
    assert hashes.equal([a], [FileState.of(tmp_path / "hard")])
    assert not read


def test_a_file_that_has_changed_is_a_different_file(tmp_path: Path) -> None:
    hashes = Hashes()
    before = write(tmp_path / "a", b"one")
    copy = write(tmp_path / "b", b"one")
    os.utime(tmp_path / "a", ns=(1, 1))
    after = FileState.of(tmp_path / "a")
    assert hashes.equal([after], [copy])
    assert not hashes.equal([before], [copy]), "its former content is not known any more"
    (tmp_path / "b").unlink()
    assert hashes.equal([after], [copy]), "it was hashed before it was removed"


def test_the_hash_of_several_files_is_the_hash_of_their_hashes(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        path.write_bytes(path.name.encode())
    hashes = Hashes()
    each = [hashlib.sha256(name).hexdigest() for name in (b"a", b"b")]
    assert hashes.content(paths[:1]) == each[0]
    assert hashes.content(paths) == hashlib.sha256("".join(each).encode()).hexdigest()
    assert hashes.content_later(paths).result(10) == hashes.content(paths)


def test_an_error_in_the_background_is_raised_where_the_result_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Hashes().content_later([tmp_path / "nothing"]).result(10)
