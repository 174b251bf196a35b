"""Archives around checkpoints: a model in one loads; an unsafe one is refused, and leaves nothing."""

import io
import os
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny_lms
import torch

from musicgen_svc.checkpoints import CodecPointer, open_checkpoint
from musicgen_svc.checkpoints.archives import is_archive
from musicgen_svc.checkpoints.unpacking import remove_leftovers, unpack_once
from musicgen_svc.errors import WeightsError
from musicgen_svc.loading.loader import Loader
from musicgen_svc.settings import Settings
from musicgen_svc.weights.catalog import read_catalog
from musicgen_svc.weights.paths import UNPACKED, Weights

CONFIG = tiny_lms.config_of("small")
MODES = ["w", "w:gz", "w:bz2", "w:xz", "zip"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes a model as one file, in the format of a Cog trainer."""
    path = tmp_path_factory.mktemp("model") / "trained_model.tar"
    torch.save({"xp.cfg": tiny_lms.dict_config(CONFIG), "model": tiny_lms.lm_of(CONFIG)}, path)
    return path


def pack(path: Path, mode: str, files: dict[str, Path]) -> Path:
    if mode == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, file in files.items():
                archive.write(file, name)
    else:
        quick = {"w": {}, "w:xz": {"preset": 0}}.get(mode, {"compresslevel": 1})
        with tarfile.open(path, mode, **quick) as archive:
            for name, file in files.items():
                archive.add(file, name)
    return path


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["trained_model.tar", "./a/b/x", "__both"])
def test_a_model_in_an_archive_loads(
    mode: str, name: str, model: Path, weights: Path, tmp_path: Path
) -> None:
    files = {name: model}
    if (
        name == "__both"
    ):  # a folder with the two files of an export, and the files that macOS adds to an archive
        files = {f"export/{file.name}": file for file in (weights / "hf-codec").iterdir()}
        files |= {"__MACOSX/export/._state_dict.bin": model, "export/._state_dict.bin": model}
    archive = pack(tmp_path / "weights.bin", mode, files)
    assert is_archive(archive)
    opened = open_checkpoint(archive, cache=tmp_path / "cache")
    expected = open_checkpoint(weights / "hf-codec" if name == "__both" else model)
    assert opened.format == expected.format
    state, wanted = opened.lm().state, expected.lm().state
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)
    assert opened.codec() == CodecPointer("encodec_32khz")


def test_an_archive_alone_in_a_folder_is_what_the_folder_holds(model: Path, tmp_path: Path) -> None:
    """Users put an archive into weights/finetuned as it is. Git and file managers add dot files."""
    folder, cache = tmp_path / "finetuned", tmp_path / "cache"
    folder.mkdir()
    pack(folder / "upload.zip", "zip", {"trained_model.tar": model})
    (folder / ".gitkeep").touch()
    assert open_checkpoint(folder, cache=cache).format == open_checkpoint(model).format
    (folder / "notes.txt").touch()
    with pytest.raises(WeightsError, match="finetuned holds no MusicGen"):
        open_checkpoint(folder, cache=cache)


def test_whoever_may_read_the_cache_may_read_what_was_unpacked(model: Path, tmp_path: Path) -> None:
    """The next server may run as another user than the one that unpacked the archive."""
    umask = os.umask(0o022)
    try:
        folder = unpack_once(pack(tmp_path / "x", "w", {"m": model}), tmp_path / "cache").folder
    finally:
        os.umask(umask)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (folder, folder / "m", tmp_path / "cache")]
    assert modes == [0o755, 0o644, 0o755]


def test_a_torch_save_file_is_no_archive_and_a_tar_that_ends_in_one_is(model: Path, tmp_path: Path) -> None:
    """A reader that looks only at the end of a file, as `zipfile` does, takes both for zips."""
    assert zipfile.is_zipfile(model)
    assert not is_archive(model)
    tar = pack(tmp_path / "x", "w", {"model": model})
    assert zipfile.is_zipfile(tar)
    assert is_archive(tar)


def test_an_archive_is_unpacked_once_for_its_content(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    given = unpack_once(pack(tmp_path / "x.tar", "w", {"m": model}), cache)
    given.accept()
    first = given.folder
    (first / "m").chmod(0o400)
    stamp = (first / "m").stat().st_mtime_ns
    os.link(tmp_path / "x.tar", tmp_path / "same.zip")
    assert unpack_once(tmp_path / "same.zip", cache).folder == first
    assert (first / "m").stat().st_mtime_ns == stamp
    other = tmp_path / "other"
    other.write_bytes(b"2")
    (tmp_path / "x.tar").unlink()
    given = unpack_once(pack(tmp_path / "x.tar", "w", {"m": other}), cache)
    given.accept()
    second = given.folder
    assert second != first
    assert sorted(path.name for path in cache.iterdir()) == sorted([".lock", first.name, second.name])


def test_without_a_place_to_unpack_it_says_so(model: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="is an archive, and no folder to unpack it in is set"):
        open_checkpoint(pack(tmp_path / "x", "w", {"m": model}))


# --- what is refused, before anything is written ---------------------------------------------------


def tar_of(*members: tuple[str, bytes, int]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with tarfile.open(path, "w") as archive:
            for name, content, kind in members:
                info = tarfile.TarInfo(name)
                info.type, info.size = bytes([kind]), len(content)
                info.linkname = "../../../secret" if kind in (ord("1"), ord("2")) else ""
                archive.addfile(info, io.BytesIO(content))

    return write


def zip_of(*members: tuple[str, bytes, int]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content, mode in members:
                info = zipfile.ZipInfo(name)
                info.external_attr = mode << 16
                archive.writestr(info, content, zipfile.ZIP_DEFLATED)

    return write


def encrypted(path: Path) -> None:
    zip_of(("a", b"x", 0))(path)
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + offset] |= 1
    path.write_bytes(data)


def claimed(path: Path) -> None:
    """Writes a tar whose header says that its one file has 10 GB, as a compressed file could."""
    info = tarfile.TarInfo("a")
    info.size = 10 << 30
    path.write_bytes(info.tobuf() + bytes(1024))


def long_header(path: Path) -> None:
    """Writes a tar whose first header says that the next 3 GB are the name of a file."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 3 << 30
    path.write_bytes(info.tobuf() + bytes(1024))


def endless_headers(path: Path) -> None:
    """Writes a tar of 3,000 headers, each of which describes the next header."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2
    path.write_bytes((info.tobuf() + b"a\0".ljust(512, b"\0")) * 3000 + bytes(1024))


FILE, HARD_LINK, LINK, DEVICE, FIFO = (ord(kind) for kind in "01236")
BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "tar, parent": (tar_of(("ok", b"1", FILE), ("../out", b"1", FILE)), "'../out', which is a path out of"),
    "tar, deep parent": (tar_of(("a/b/../../../out", b"1", FILE)), "which is a path out of"),
    "tar, absolute": (tar_of(("/tmp/out", b"1", FILE)), "'/tmp/out', which is a path out of"),
    "tar, link": (tar_of(("ok", b"1", FILE), ("a", b"", LINK)), "'a', which is a link"),
    "tar, hard link": (tar_of(("a", b"", HARD_LINK)), "'a', which is a link"),
    "tar, device": (tar_of(("a", b"", DEVICE)), "a device"),
    "tar, pipe": (tar_of(("a", b"", FIFO)), "a device"),
    "tar, too large": (tar_of(("a", bytes(600), FILE), ("b", bytes(600), FILE)), "more than 1000 bytes"),
    "tar, a large claim": (claimed, "more than 1000 bytes"),
    "tar, a long header": (long_header, "cannot be read as an archive"),
    "tar, endless headers": (endless_headers, "cannot be read as an archive"),
    "tar, too many": (tar_of(*((f"f{i}", b"", FILE) for i in range(10_001))), "more than 10000 files"),
    "tar, twice the same": (tar_of(("a", b"1", FILE), ("a", b"2", FILE)), "holds two entries of one name"),
    "tar, file as folder": (tar_of(("a", b"1", FILE), ("a/b", b"2", FILE)), "holds two entries of one name"),
    "zip, parent": (zip_of(("ok", b"1", 0), ("../out", b"1", 0)), "'../out', which is a path out of"),
    "zip, absolute": (zip_of(("/tmp/out", b"1", 0)), "which is a path out of"),
    "zip, backslash": (zip_of(("..\\out", b"1", 0)), "which is a path out of"),
    "zip, link": (zip_of(("a", b"../../secret", stat.S_IFLNK | 0o777)), "'a', which is a link"),
    "zip, bomb": (zip_of(("a", bytes(5_000_000), 0)), "more than 1000 bytes"),
    "zip, encrypted": (encrypted, "is encrypted"),
}  # fmt: skip


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Path]:
    """Makes a folder for the cache. Fails if the test leaves a file in it."""
    home = tmp_path / "home"
    home.mkdir()
    yield home
    left = [path for path in home.rglob("*") if path.name not in ("cache", ".lock")]
    assert left == []


@pytest.mark.parametrize("name", BAD)
def test_what_is_unsafe_is_refused_and_leaves_nothing(name: str, watched: Path, tmp_path: Path) -> None:
    make, message = BAD[name]
    archive = tmp_path / "archive"
    make(archive)
    with pytest.raises(WeightsError, match=message):
        open_checkpoint(archive, cache=watched / "cache", limit_bytes=1000)


def test_a_bomb_is_refused_before_it_is_inflated(
    watched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts the bytes that are inflated of a small file that holds 64 MB of zeros."""
    import gzip

    content = tmp_path / "zeros"
    content.write_bytes(bytes(64 << 20))
    archive = pack(tmp_path / "bomb", "w:gz", {"zeros": content})
    assert archive.stat().st_size < 1 << 19
    inflated = 0
    read = gzip.GzipFile.read

    def counting(self: gzip.GzipFile, size: int = -1) -> bytes:
        nonlocal inflated
        data = read(self, size)
        inflated += len(data)
        return data

    monkeypatch.setattr(gzip.GzipFile, "read", counting)
    with pytest.raises(WeightsError, match="more than 1000000 bytes"):
        unpack_once(archive, watched / "cache", 1_000_000)
    assert inflated < 10_000


@pytest.mark.parametrize("mode", ["w:gz", "zip"])
def test_a_damaged_archive_is_refused_and_leaves_nothing(
    mode: str, model: Path, watched: Path, tmp_path: Path
) -> None:
    archive = tmp_path / "x"
    if mode == "zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            file.write(model, "model")
    else:
        pack(archive, mode, {"model": model})
    data = bytearray(archive.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)
    archive.write_bytes(data)
    with pytest.raises(WeightsError, match="cannot be read as an archive"):
        open_checkpoint(archive, cache=watched / "cache")


def test_a_disk_too_small_is_said_before_it_is_full(
    model: Path, watched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(WeightsError, match="has 1,000 left: make room there"):
        unpack_once(pack(tmp_path / "x", "w", {"m": model}), watched / "cache")


# --- what an interrupted unpacking leaves -----------------------------------------------------------

SLOWLY = """
import sys, time
from pathlib import Path
from musicgen_svc.checkpoints import archives, unpacking

write = archives._write
archives._write = lambda *args: (write(*args), print("writing", flush=True), time.sleep(60))
unpacking.unpack_once(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.fixture
def unpacking(model: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Starts a process that stops in the middle of unpacking. Yields the process and its cache."""
    cache = tmp_path / "cache"
    archive = pack(tmp_path / "other.tar", "w", {"m": model})
    command = [sys.executable, "-c", SLOWLY, str(archive), str(cache)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "writing\n"
        try:
            yield process, cache
        finally:
            process.kill()


def test_what_a_killed_process_left_is_removed_and_what_a_running_one_writes_is_not(
    unpacking: tuple[subprocess.Popen[str], Path], tmp_path: Path
) -> None:
    process, cache = unpacking
    (unfinished,) = cache.glob(".unpacking-*")
    remove_leftovers(cache)
    assert (unfinished / "m").is_file(), "its process still runs"
    process.kill()
    process.wait()
    Weights.at(cache.parent, read_catalog(), None)
    assert unfinished.is_dir(), "the cache is not in this folder of weights"
    cache.rename(tmp_path / UNPACKED)
    Weights.at(tmp_path, read_catalog(), None)
    assert [path.name for path in (tmp_path / UNPACKED).iterdir()] == [".lock"]


def test_leftovers_are_removed_before_an_archive_is_unpacked(model: Path, tmp_path: Path) -> None:
    """Leftovers may fill the disk, so that it has no room for the archive."""
    (tmp_path / "cache" / ".unpacking-x" / "deep").mkdir(parents=True)
    given = unpack_once(pack(tmp_path / "x", "w", {"m": model}), tmp_path / "cache")
    given.accept()
    folder = given.folder
    assert sorted(path.name for path in folder.parent.iterdir()) == sorted([".lock", folder.name])


def test_a_folder_without_leftovers_is_not_written_to(tmp_path: Path) -> None:
    remove_leftovers(tmp_path)
    remove_leftovers(tmp_path / "absent")
    assert list(tmp_path.iterdir()) == []


# --- what is refused after it was unpacked ------------------------------------------------------------


def left_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.name != ".lock")


def export_without(weights: Path, folder: Path, name: str) -> Path:
    """Packs an export of the model `small` into an archive, without the tensor called `name`."""
    package = torch.load(weights / "small" / "state_dict.bin", weights_only=True)
    del package["best_state"][name]
    torch.save(package, folder / "state_dict.bin")
    codec = weights / "small" / "compression_state_dict.bin"
    return pack(
        folder / "upload.zip", "zip", {"state_dict.bin": folder / "state_dict.bin", codec.name: codec}
    )


def loader(writable_weights: Path, given: Path) -> Loader:
    return Loader(Weights.at(writable_weights, read_catalog(), str(given)), tiny_lms.CPU, Settings())


def test_an_archive_without_a_model_is_gone_when_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no model")
    archive = pack(
        tmp_path / "x.zip", "zip", {"a/notes.txt": tmp_path / "notes.txt", "b": tmp_path / "notes.txt"}
    )
    with pytest.raises(WeightsError, match=r"/x\.zip holds no MusicGen"):
        open_checkpoint(archive, cache=tmp_path / "cache")
    assert left_in(tmp_path / "cache") == []


def test_a_damaged_file_in_an_archive_is_named_by_the_archive(tmp_path: Path) -> None:
    (tmp_path / "state_dict.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    archive = pack(
        tmp_path / "x.zip",
        "zip",
        {"own/state_dict.bin": tmp_path / "state_dict.bin", "own/a": tmp_path / "state_dict.bin"},
    )
    with pytest.raises(WeightsError, match=r"/x\.zip/own/state_dict\.bin is a Git LFS pointer") as caught:
        open_checkpoint(archive, cache=tmp_path / "cache")
    assert (
        ".zip" not in caught.value.for_client and "own/state_dict.bin is a Git LFS" in caught.value.for_client
    )


def test_what_does_not_load_is_gone_and_what_did_load_stays(
    writable_weights: Path, weights: Path, tmp_path: Path
) -> None:
    """The missing tensor is the last of the model, so that loading fails as late as it can."""
    cache = writable_weights / UNPACKED
    archive = export_without(weights, tmp_path, "out_norm.weight")
    for _ in range(2):
        with pytest.raises(WeightsError, match=rf"{archive}.* does not fit .*out_norm\.weight"):
            loader(writable_weights, archive).start()
        assert left_in(cache) == []
    export = {file.name: file for file in (weights / "small").iterdir()}
    good = pack(tmp_path / "good.zip", "zip", export)
    model = loader(writable_weights, good).start()
    assert left_in(cache) == [model.path.name]
    loader(writable_weights, good)
    assert left_in(cache) == [model.path.name], "a start keeps it"


def test_a_codec_or_a_question_that_fails_leaves_nothing(
    writable_weights: Path, weights: Path, tmp_path: Path
) -> None:
    """A request may ask for the codec, or whether a model follows a melody, before the model is loaded."""
    package = torch.load(weights / "small" / "state_dict.bin", weights_only=True)
    package["xp.cfg"] = package["xp.cfg"].replace("model: t5", "model: clap")
    torch.save(package, tmp_path / "state_dict.bin")
    archive = pack(tmp_path / "x.zip", "zip", {"state_dict.bin": tmp_path / "state_dict.bin"})
    models = loader(writable_weights, archive)
    with pytest.raises(WeightsError, match="conditioned on"):
        models.takes_melody("finetuned")
    assert left_in(writable_weights / UNPACKED) == []


KILLED = """
import os, sys
from pathlib import Path
from musicgen_svc.checkpoints import open_checkpoint

opened = open_checkpoint(Path(sys.argv[1]), cache=Path(sys.argv[2]))
print("opened", flush=True)
sys.stdin.read()
"""


def test_what_a_killed_process_had_on_trial_goes_at_the_next_start(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / UNPACKED
    archive = pack(tmp_path / "x.tar", "w", {"m": model})
    command = [sys.executable, "-c", KILLED, str(archive), str(cache)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout and process.stdout.readline() == "opened\n"
            Weights.at(tmp_path, read_catalog(), None)
            (folder, trial) = sorted(path for path in cache.iterdir() if path.name != ".lock")
            assert trial.name == f"{folder.name}.trial", "its process still runs"
            mine = unpack_once(archive, cache)
            mine.refuse()
            assert folder.is_dir(), "another process tries it"
        finally:
            process.kill()
    Weights.at(tmp_path, read_catalog(), None)
    assert left_in(cache) == []


def test_what_one_process_accepted_no_other_removes(model: Path, tmp_path: Path) -> None:
    archive = pack(tmp_path / "x.tar", "w", {"m": model})
    one, other = unpack_once(archive, tmp_path / "cache"), unpack_once(archive, tmp_path / "cache")
    one.accept()
    other.refuse()
    assert left_in(tmp_path / "cache") == [one.folder.name]


def test_a_tar_that_was_cut_between_two_files_is_refused(weights: Path, tmp_path: Path) -> None:
    """Otherwise the second file, the codec, would be missing, and another codec would be used silently."""
    files = {name: weights / "small" / name for name in ("state_dict.bin", "compression_state_dict.bin")}
    archive = pack(tmp_path / "x.tar", "w", files)
    with tarfile.open(archive) as opened:
        second = opened.getmember("compression_state_dict.bin").offset
    os.truncate(archive, second)
    with pytest.raises(WeightsError, match=r"x\.tar cannot be read as an archive, as it is .*truncated"):
        open_checkpoint(archive, cache=tmp_path / "cache")
    assert left_in(tmp_path / "cache") == []


def test_a_full_disk_is_said_with_the_room_that_is_needed(
    model: Path, watched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("musicgen_svc.checkpoints.archives._write", full)
    with pytest.raises(
        WeightsError, match=rf"unpacks to {model.stat().st_size:,} bytes, and the disk of .* is full"
    ):
        unpack_once(pack(tmp_path / "x", "w", {"m": model}), watched / "cache")
