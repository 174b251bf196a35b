"""scripts/serve: Cog's server with a readable console, of which nothing stays behind."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import toy
from server import ROOT, CogServer
from toy import needs_proc, processes_with, wait_for

from musicgen_svc.cli import download_weights
from musicgen_svc.cli.cog_server import environment
from musicgen_svc.cli.prediction_folders import PredictionFolders, UnusableFolderError, check
from musicgen_svc.cli.reaper import Reaper


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="module")
def server(checkout: Path) -> Iterator[CogServer]:
    with CogServer(root=checkout) as running:
        yield running


def test_requests_are_checked_against_the_schema(server: CogServer) -> None:
    reply = server.predict({"duration": 601})
    assert reply["code"] == 422
    assert reply["detail"][0]["loc"] == ["body", "input", "duration"]
    assert server.predict({"prompt": "fine", "duration": 599})["status"] == "succeeded"


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        *(("model_version", model, 200) for model in ("melody", "small", "medium", "large", "encode-decode")),
        *(("normalization_strategy", strategy, 200) for strategy in ("loudness", "clip", "peak", "rms")),
        *(("output_format", suffix, 200) for suffix in ("wav", "mp3")),
        ("duration", 8.0, 200),
        ("seed", 4294967295, 200),
        ("an_unknown_field", 1, 200),
        ("model_version", "huge", 422),
        ("seed", 4294967296, 422),
        ("prompt", None, 422),
        ("prompt", True, 422),
        ("duration", 8.5, 422),
    ],
)
def test_coglet_reads_the_schema_as_it_is_meant(
    server: CogServer, name: str, value: object, code: int
) -> None:
    assert server.predict({"prompt": "x", name: value})["code"] == code


def test_the_console_has_words_and_not_coglets_json(server: CogServer) -> None:
    server.predict({"prompt": "refused"}, id="a-refusal")
    server.predict({"prompt": "fine", "seed": 99}, id="a-success")
    refused = "[a-refusal] Prediction failed: prompt is 'refused'; it must be another.\n"
    wait_for(lambda: refused in server.log and "[a-success] seed: 99\n" in server.log)
    wait_for(lambda: "Ready after" in server.log)
    assert "{" not in server.log
    assert "\033" not in server.log


def test_our_warnings_are_shown_and_third_parties_are_not(server: CogServer) -> None:
    wait_for(lambda: "UserWarning: ours" in server.log)
    assert "theirs" not in server.log


def test_a_taken_port_is_one_sentence(checkout: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = subprocess.run(
            [sys.executable, "-P", "-m", "musicgen_svc.cli.serve"],
            env={**os.environ, "PYTHONPATH": str(checkout), "PORT": str(port)},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert ended.returncode == 1
    assert ended.stderr == (
        f"Port {port} on 127.0.0.1 is taken: stop what listens there, or choose another by PORT=...\n"
    )


def test_a_failed_set_up_says_why_and_the_server_stays_to_say_so(checkout: Path) -> None:
    with CogServer(root=checkout, COG_WEIGHTS="broken") as server:
        wait_for(lambda: "Setup failed: COG_WEIGHTS is 'broken', where there is no state_" in server.log)
        assert server.health()["status"] == "SETUP_FAILED"
        assert server.stop() == 0
        assert server.log.count("no state_dict.bin") == 1


def test_paths_are_relative_to_the_user_and_not_to_the_checkout(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with CogServer(root=checkout, cwd=tmp_path, COG_WEIGHTS="mine") as server:
        wait_for(lambda: f"weights: {tmp_path / 'mine'}\n" in server.log)


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
    """Else every prediction would take a place and keep it."""
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


@needs_proc
def test_nothing_stays_behind_when_stopped_during_a_request(checkout: Path, tmp_path: Path) -> None:
    with CogServer(root=checkout, TMPDIR=str(tmp_path)) as server:
        clip = "data:audio/wav;base64,UklGRg=="
        answer = server.submit({"prompt": "slow", "input_audio": clip}, id="slow-request")
        wait_for(lambda: list(tmp_path.rglob("half-written")))
        assert len(processes_with(str(tmp_path))) >= 5  # ours, the reaper, Cog, the worker and its child
        assert server.stop() == 0
        assert processes_with(str(tmp_path)) == []
        assert list(tmp_path.iterdir()) == []
        assert not Path("/tmp/coglet/predictions/slow-request").exists()
        with pytest.raises(requests.ConnectionError):
            answer.result(timeout=30)


@needs_proc
def test_ctrl_c_twice_does_not_wait_for_open_requests(tmp_path: Path) -> None:
    checkout = toy.checkout(tmp_path / "checkout", OPEN_REQUESTS_S=600)
    (tmp_path / "temporary").mkdir()
    with CogServer(root=checkout, TMPDIR=str(tmp_path / "temporary")) as server:
        server.submit({"prompt": "slow"}, id="impatient")
        wait_for(lambda: list(tmp_path.rglob("half-written")))
        server.process.send_signal(signal.SIGINT)
        wait_for(lambda: "Stopping" in server.log)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) == 0
        assert processes_with(str(tmp_path)) == []


@needs_proc
def test_it_stops_when_whoever_started_it_is_gone(checkout: Path, tmp_path: Path) -> None:
    with CogServer(root=checkout, TMPDIR=str(tmp_path)) as server:
        assert server.process.stdin
        server.process.stdin.close()
        assert server.process.wait(60) == 0
        assert processes_with(str(tmp_path)) == []
        assert list(tmp_path.iterdir()) == []


def test_two_servers_at_once_do_not_disturb_each_other(checkout: Path, server: CogServer) -> None:
    with CogServer(root=checkout) as second:
        assert second.url != server.url
        assert second.predict({"prompt": "second"})["status"] == "succeeded"
    assert server.predict({"prompt": "first"})["status"] == "succeeded"


def test_a_server_that_hangs_is_shown_thread_by_thread_and_stopped(checkout: Path) -> None:
    """What the harness of these tests does for whoever reads their log."""
    with CogServer(root=checkout) as server:
        server.answer_s = 1.0
        with pytest.raises(
            AssertionError, match=r'(?s)No answer to POST.*/service\.py", line \d+ in predict'
        ):
            server.predict({"prompt": "deadlock"})
        assert server.process.wait(60) == 0
        with pytest.raises(requests.ConnectionError):
            server.health()


def test_a_path_is_where_the_user_is_and_a_link_stays_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies beside a link is looked for there; and what is not there is the checkout's."""
    (tmp_path / "store").mkdir()
    (tmp_path / "current").symlink_to(tmp_path / "store")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COG_WEIGHTS", "current")
    monkeypatch.setenv("MUSICGEN_WEIGHTS_DIR", "store")
    given = environment(5000, tmp_path)
    assert given["COG_WEIGHTS"] == str(tmp_path / "current")
    assert given["MUSICGEN_WEIGHTS_DIR"] == str(download_weights.chosen_folder().absolute())
    monkeypatch.setenv("MUSICGEN_WEIGHTS_DIR", "weights")
    assert environment(5000, tmp_path)["MUSICGEN_WEIGHTS_DIR"] == "weights"  # the server runs there
    assert download_weights.chosen_folder() == download_weights.ROOT / "weights"
    (tmp_path / "weights").mkdir()
    monkeypatch.delenv("MUSICGEN_WEIGHTS_DIR")
    assert download_weights.chosen_folder() == download_weights.ROOT / "weights"


def test_a_gpu_takes_as_many_at_once_as_it_holds_and_a_cpu_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def at_once() -> str:
        return environment(5000, tmp_path)["COG_MAX_CONCURRENCY"]

    monkeypatch.delenv("COG_MAX_CONCURRENCY", raising=False)
    monkeypatch.delenv("MUSICGEN_DEVICE", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert at_once() == "1"
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho No devices were found; exit 6\n")
    tool.chmod(0o755)
    assert at_once() == "1"
    expected = {"8192": "1", "15360": "1", "24564": "4", "32607": "8", "46068": "16", "143771": "16"}
    for memory_mib, held in expected.items():
        tool.write_text(f"#!/bin/sh\necho {memory_mib}\necho 150000\n")
        assert at_once() == held
    tool.write_text("#!/bin/sh\necho 24564\n")
    assert f"@concurrent(max={at_once()})" in (ROOT / "predict.py").read_text()
    assert f"COG_MAX_CONCURRENCY={at_once()} " in (ROOT / "cog.yaml").read_text(), (
        "what the image is made for"
    )
    monkeypatch.setenv("MUSICGEN_DEVICE", "cpu")
    assert at_once() == "1"
    monkeypatch.setenv("COG_MAX_CONCURRENCY", "7")
    assert at_once() == "7"
