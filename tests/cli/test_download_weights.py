"""`scripts/download_weights` against a local hub, and what the service checks of the result."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants

from musicgen_svc.cli import download_weights
from musicgen_svc.errors import WeightsError
from musicgen_svc.weights.catalog import read_catalog
from musicgen_svc.weights.lock_file import LOCK_FILE, check_sizes, read_lock
from tests.cli.hub import Failure, Hub, running_hub
from tests.cli.repository import ROOT

MODULE = "musicgen_svc.cli.download_weights"
CHUNK = 2**14
IN_CHUNKS = f"import huggingface_hub.constants as c; c.DOWNLOAD_CHUNK_SIZE = {CHUNK}"
"""Makes huggingface_hub write after each CHUNK bytes, not after 10 MiB, so that test files can be small."""
T5 = {"config.json": b"{}", "model.safetensors": b"t5" * 1000, "spiece.model": b"s", "tokenizer.json": b"{ }"}
SMALL = {"state_dict.bin": b"lm" * 3000, "compression_state_dict.bin": b"codec" * 500, "README.md": b"#"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub with one model. huggingface_hub in this process uses it, as if HF_ENDPOINT had named it."""
    with running_hub() as hub:
        hub.files = {"facebook/musicgen-small": dict(SMALL), "google-t5/t5-base": dict(T5)}
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home"))
        monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(tmp_path / "home" / "asked"))
        yield hub
        close_session()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "weights"


def long_file(hub: Hub) -> bytes:
    """Publishes a language model of several chunks."""
    content = random.Random(0).randbytes(5 * CHUNK + 100)
    hub.files["facebook/musicgen-small"]["state_dict.bin"] = content
    return content


def command(folder: Path, *arguments: str, before: str = "") -> list[str]:
    """The command line of the script. `before`: Python that runs in the same process first."""
    start = ["-m", MODULE]
    if before:
        start = ["-c", f"{before}\nimport runpy; runpy.run_module({MODULE!r}, run_name='__main__')"]
    return [sys.executable, *start, *arguments, "--weights-dir", str(folder)]


def environment(endpoint: str, folder: Path, **extra: str) -> dict[str, str]:
    return os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(folder.parent / "home"),
        "HF_HUB_CACHE": str(folder.parent / "home"),
        "PYTHONPATH": str(ROOT),
        **extra,
    }


def run(
    hub: Hub, folder: Path, *arguments: str, before: str = "", **extra: str
) -> subprocess.CompletedProcess[str]:
    """Runs the script as a process."""
    return subprocess.run(
        command(folder, *arguments, before=before),
        env=environment(hub.endpoint, folder, **extra),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def one_sentence(stderr: str) -> str:
    """Checks that standard error is one sentence, and returns it."""
    assert re.fullmatch(r"[^\n]+\.\n", stderr), stderr
    return stderr.strip()


def downloaded(folder: Path, *arguments: str) -> None:
    """Downloads `small` in this process."""
    assert download_weights.main([*arguments, "small", "--weights-dir", str(folder)]) == 0


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs the command in this process, where it must fail. Returns its sentence."""
    assert download_weights.main([*(arguments or ["small"]), "--weights-dir", str(folder)]) == 1
    return one_sentence(capsys.readouterr().err)


def arrived(folder: Path, name: str) -> dict[str, bytes]:
    """The files of a source: name -> content."""
    source = folder / name
    return {path.name: path.read_bytes() for path in source.iterdir()} if source.is_dir() else {}


def partial(folder: Path) -> Path:
    """The language model's partial file."""
    (path,) = (folder / ".partial" / "small").glob("state_dict.bin.*")
    return path


def test_a_model_arrives_with_what_it_needs_and_is_recorded(hub: Hub, folder: Path) -> None:
    hub.token = "hf_secret"
    result = run(hub, folder, "small", HF_TOKEN="hf_secret", TQDM_POSITION="-1")
    assert result.returncode == 0, result.stderr
    wanted = {name: content for name, content in SMALL.items() if name != "README.md"}
    assert arrived(folder, "small") == wanted
    assert arrived(folder, "t5-base") == T5
    assert sorted(path.name for path in folder.iterdir() if path.name != ".partial") == [
        "small", "t5-base", LOCK_FILE,
    ]  # fmt: skip
    assert list((folder / ".partial").iterdir()) == []
    entry = json.loads((folder / LOCK_FILE).read_text())["small"]
    assert entry["revision"] == hub.revision("facebook/musicgen-small")
    assert entry["files"] == {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in wanted.items()
    }
    assert re.search(r"small/state_dict\.bin: 100%", result.stderr), "no progress bar"
    to_storage = [r.token for r in hub.requests if r.path.startswith("/storage/")]
    assert len(to_storage) == 3
    assert set(to_storage) == {None}, "the token left the hub"


def test_a_second_run_asks_nobody_and_an_update_fetches_what_is_new(hub: Hub, folder: Path) -> None:
    downloaded(folder)
    hub.files["facebook/musicgen-small"]["state_dict.bin"] = b"newer" * 1000
    hub.requests.clear()
    downloaded(folder)
    assert hub.requests == []
    downloaded(folder, "--update")
    assert arrived(folder, "small")["state_dict.bin"] == b"newer" * 1000
    assert hub.starts("state_dict.bin") == [0, 0]
    assert hub.starts("compression_state_dict.bin") == [0], "what had not changed came twice"
    assert read_lock(folder)["small"].revision == hub.revision("facebook/musicgen-small")


def test_a_cut_connection_resumes_within_the_run(hub: Hub, folder: Path) -> None:
    content = long_file(hub)
    hub.failures["state_dict.bin"] = [Failure(2 * CHUNK + 10, "close")]
    assert run(hub, folder, "small", before=IN_CHUNKS).returncode == 0
    assert arrived(folder, "small")["state_dict.bin"] == content
    assert hub.starts("state_dict.bin") == [0, 2 * CHUNK]


def resumes(hub: Hub, folder: Path, content: bytes) -> None:
    """Checks that nothing counts as complete, and that the next run fetches only the rest of `content`."""
    assert arrived(folder, "small") == {}
    assert "small" not in read_lock(folder)
    part = partial(folder).read_bytes()
    assert content.startswith(part)
    assert CHUNK <= len(part) < len(content)
    downloaded(folder)
    assert arrived(folder, "small")["state_dict.bin"] == content
    assert hub.starts("state_dict.bin") == [0, len(part)]


def test_a_broken_connection_ends_the_run_and_the_next_one_resumes(hub: Hub, folder: Path) -> None:
    content = long_file(hub)
    hub.failures["state_dict.bin"] = [Failure(3 * CHUNK + 10, "reset")]
    result = run(hub, folder, "small", before=IN_CHUNKS)
    assert result.returncode == 1
    said = one_sentence(result.stderr)
    assert re.search(r"connection to .* failed at small/state_dict\.bin", said)
    resumes(hub, folder, content)


def test_an_interrupted_run_ends_at_once_and_the_next_one_resumes(hub: Hub, folder: Path) -> None:
    content = long_file(hub)
    hub.failures["state_dict.bin"] = [Failure(3 * CHUNK + 10, "stall")]
    with subprocess.Popen(
        command(folder, "small", before=IN_CHUNKS),
        env=environment(hub.endpoint, folder),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while not any(path.stat().st_size for path in (folder / ".partial" / "small").glob("state_dict*")):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.fullmatch(r"Interrupted: [^\n]+\.\n", stderr)
    resumes(hub, folder, content)


def test_a_full_disk_ends_the_run_and_the_next_one_resumes(hub: Hub, folder: Path) -> None:
    content = long_file(hub)
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({2 * CHUNK + 10},) * 2)"
    result = run(hub, folder, "small", before=f"{IN_CHUNKS}\n{limit}")
    assert result.returncode == 1
    said = one_sentence(result.stderr)
    to_come = len(content) - partial(folder).stat().st_size
    assert f"disk is full at small/state_dict.bin: free {to_come:,} bytes, then run the same" in said
    resumes(hub, folder, content)


def test_files_that_do_not_fit_on_the_disk_are_not_downloaded(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    room = shutil.disk_usage(folder.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: room._replace(free=5000))
    assert re.match(r"10\.51 kB are to come and .* has 5\.00 kB free", refused(folder, capsys))
    assert hub.transfers == []


@pytest.mark.parametrize("damaged", ["state_dict.bin", "config.json"], ids=["large file", "small file"])
def test_a_wrong_hash_is_refused_and_fetched_anew(hub: Hub, folder: Path, damaged: str) -> None:
    hub.damaged = {damaged}
    result = run(hub, folder, "small")  # in a process, whose end is the end of its other files' transfers
    assert result.returncode == 1
    said = one_sentence(result.stderr)
    assert f"/{damaged} arrived with another hash" in said
    broken = said.split("/")[0]
    assert arrived(folder, broken) == {}
    assert broken not in read_lock(folder)
    hub.damaged.clear()
    downloaded(folder)
    assert hub.starts(damaged) == [0, 0]


@pytest.mark.parametrize(
    ("status", "hint"), [(401, "HF_TOKEN"), (403, "HF_TOKEN"), (404, "HF_ENDPOINT"), (500, "again")]
)
def test_a_refusal_is_one_sentence(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str], status: int, hint: str
) -> None:
    hub.refuses["facebook/musicgen-small"] = status
    said = refused(folder, capsys)
    assert f"answered {status} for facebook/musicgen-small" in said
    assert hint in said


def test_a_revision_that_is_gone_is_replaced_on_request(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    downloaded(folder)
    (folder / "small" / "state_dict.bin").unlink()
    hub.files["facebook/musicgen-small"]["README.md"] = b"# newer"
    assert "--update" in refused(folder, capsys)
    downloaded(folder, "--update")
    assert arrived(folder, "small")["state_dict.bin"] == SMALL["state_dict.bin"]


def test_a_file_that_the_repository_lacks_is_named(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del hub.files["facebook/musicgen-small"]["compression_state_dict.bin"]
    assert "has no compression_state_dict.bin" in refused(folder, capsys)


def test_a_server_that_is_no_hub_is_named(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.babbles = True
    assert "does not answer as a Hugging Face hub does" in refused(folder, capsys)


def test_a_hub_out_of_reach_is_named(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.server_close()
    assert f"connection to {hub.endpoint} failed" in refused(folder, capsys)


def test_offline_mode_is_respected(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = refused(folder, capsys)
    assert said == "facebook/musicgen-small must be downloaded but HF_HUB_OFFLINE is set: unset it."
    assert hub.requests == []


def test_the_library_s_own_client_fills_the_same_folder(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_XET_HIGH_PERFORMANCE", True)
    downloaded(folder)
    assert arrived(folder, "t5-base") == T5
    assert arrived(folder, "small")["state_dict.bin"] == SMALL["state_dict.bin"]
    assert "HEAD" in {r.method for r in hub.requests}, "hf_hub_download was not called"


def test_files_that_are_there_already_are_read_and_recorded_not_fetched(hub: Hub, folder: Path) -> None:
    for name, content in SMALL.items():
        (folder / "small").mkdir(parents=True, exist_ok=True)
        (folder / "small" / name).write_bytes(content)
    (folder / "small" / "compression_state_dict.bin").write_bytes(b"other" * 500)
    downloaded(folder)
    assert hub.starts("state_dict.bin") == []
    assert arrived(folder, "small") == SMALL
    assert "state_dict.bin" in read_lock(folder)["small"].files


def test_damage_is_found_named_and_repaired(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    downloaded(folder)
    check_sizes(folder)
    assert download_weights.main(["--verify", "--weights-dir", str(folder)]) == 0
    assert "small/state_dict.bin: good" in capsys.readouterr().out

    path = folder / "small" / "state_dict.bin"
    flipped = bytearray(SMALL["state_dict.bin"])
    flipped[1234] ^= 1
    path.write_bytes(flipped)
    check_sizes(folder)
    assert refused(folder, capsys, "--verify").startswith(f"{path} has another sha256")
    assert download_weights.main(["t5-base", "--verify", "--weights-dir", str(folder)]) == 0

    path.write_bytes(SMALL["state_dict.bin"][:-1])
    with pytest.raises(WeightsError, match=rf"{path} has 5,999 bytes instead of 6,000: .*\.$"):
        check_sizes(folder)
    downloaded(folder)
    assert "state_dict.bin has 5,999 bytes instead of 6,000: fetching it again" in capsys.readouterr().out
    assert path.read_bytes() == SMALL["state_dict.bin"]
    assert hub.starts("state_dict.bin") == [0, 0]

    path.unlink()
    with pytest.raises(WeightsError, match=rf"{path} is missing: "):
        check_sizes(folder)


def test_what_was_not_downloaded_cannot_be_verified(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no hashes of melody, t5-base, htdemucs" in refused(folder, capsys, "melody", "--verify")


def test_sizes_are_checked_of_what_is_recorded_and_there(folder: Path) -> None:
    check_sizes(folder)
    entry = {"repository": "r", "revision": "c", "files": {"f": {"size": 3, "sha256": "0"}}}
    folder.mkdir()
    (folder / LOCK_FILE).write_text(json.dumps({"small": entry}))
    check_sizes(folder)  # the folder was removed: there is nothing to be wrong
    (folder / "small").mkdir()
    (folder / "small" / "f").write_bytes(b"abc")
    check_sizes(folder)
    (folder / LOCK_FILE).write_text("{")
    with pytest.raises(WeightsError, match=r"weights\.lock\.json is damaged or truncated: delete it"):
        check_sizes(folder)


def test_the_list_says_what_is_there_and_what_is_missing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def lay(name: str, **files: int) -> None:
        (folder / name).mkdir(parents=True)
        for stem, size in files.items():
            (folder / name / stem.replace("_bin", ".bin")).write_bytes(b"x" * size)

    lay("small", state_dict_bin=1500, compression_state_dict_bin=500)
    lay("medium", state_dict_bin=1500, compression_state_dict_bin=499)
    lay("large", state_dict_bin=7)
    lay(".partial/melody", state_dict=3_000_000)
    files = {
        "state_dict.bin": {"size": 1500, "sha256": "0"},
        "compression_state_dict.bin": {"size": 500, "sha256": "0"},
    }
    entry = {"repository": "facebook/musicgen-x", "revision": "0123456789abcdef", "files": files}
    (folder / LOCK_FILE).write_text(json.dumps({"small": entry, "medium": entry}))
    assert download_weights.main(["--list", "--weights-dir", str(folder)]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    catalog = read_catalog()
    assert lines.keys() == catalog.models.keys() | catalog.parts.keys()
    assert re.search(
        r" 2\.00 kB  complete, facebook/musicgen-x at 0123456789ab; it needs t5-base$", lines["small"]
    )
    assert re.search(r"compression_state_dict\.bin has 499 bytes instead of 500$", lines["medium"])
    assert re.search(r" 7 bytes  lacks compression_state_dict\.bin$", lines["large"])
    assert re.search(r" -  missing, 3\.00 MB of 3\.01 GB have arrived$", lines["melody"])
    assert re.search(r" -  missing, 890\.00 MB to download$", lines["t5-base"])
    assert re.match(r"multiband-diffusion \(mbd\) .* missing$", lines["multiband-diffusion"])


def test_two_downloads_do_not_share_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with download_weights.alone(folder):
        assert download_weights.main(["small", "--weights-dir", str(folder)]) == 1
    assert "Another download" in capsys.readouterr().err
    with download_weights.alone(folder):
        pass


def test_partial_files_of_another_revision_are_removed(hub: Hub, folder: Path) -> None:
    stale = folder / ".partial" / "small" / "state_dict.bin.0123456789abcdef"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"older")
    del hub.files["facebook/musicgen-small"]["compression_state_dict.bin"]
    assert download_weights.main(["small", "--weights-dir", str(folder)]) == 1
    assert stale.exists(), "the hub was not even asked for a file"
    hub.files["facebook/musicgen-small"]["compression_state_dict.bin"] = SMALL["compression_state_dict.bin"]
    hub.damaged = {"config.json"}  # T5 fails, so that its folder of partial files stays
    other = folder / ".partial" / "t5-base" / "model.safetensors.0123456789abcdef"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"older")
    result = run(hub, folder, "small")
    assert result.returncode == 1
    assert not stale.exists() and not other.exists()
