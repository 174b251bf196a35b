"""A client reads an error as one sentence without the server's folders; the log has the rest."""

import asyncio
import contextvars
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fields import FIELDS

from musicgen_svc.checkpoints.damage import check_not_damaged
from musicgen_svc.errors import DamagedFileError, GenerationError, InputError, ServiceError, WeightsError
from musicgen_svc.runtime.failures import for_client, log_failure
from musicgen_svc.service import Service
from musicgen_svc.settings import Settings


@pytest.fixture
def home(weights: Path, tmp_path: Path) -> Path:
    """Weights in a folder whose name is recognizable in messages."""
    folder = tmp_path / "operators-own" / "weights"
    for name in ("small", "melody", "t5-small", "htdemucs", "multiband-diffusion"):
        shutil.copytree(weights / name, folder / name)
    return folder


def remove(*names: str) -> Callable[[Path], None]:
    def change(home: Path) -> None:
        for name in names:
            (shutil.rmtree if (home / name).is_dir() else Path.unlink)(home / name)  # type: ignore[operator]

    return change


def pointer(name: str) -> Callable[[Path], None]:
    return lambda home: _written(home / name, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def _written(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def lacks_a_tensor(home: Path) -> None:
    package = torch.load(home / "melody" / "state_dict.bin", weights_only=True)
    del package["best_state"]["out_norm.weight"]
    torch.save(package, home / "melody" / "state_dict.bin")


def of_another_kind(home: Path) -> None:
    torch.save({"sample_rate": str(home)}, home / "multiband-diffusion" / "mbd_musicgen_32khz.th")


def names_a_file_elsewhere(home: Path) -> None:
    (home / "htdemucs" / "htdemucs.yaml").write_text(json.dumps({"models": [f"{home}/htdemucs/955717e8"]}))


MELODY: dict[str, object] = {"model_version": "melody"}
DIFFUSION: dict[str, object] = {"multi_band_diffusion": True}
MBD = "multiband-diffusion/mbd_musicgen_32khz.th"
HIDDEN = "weights that cannot be used; the server's log says why"
CASES: dict[str, tuple[Callable[[Path], None], dict[str, object], str]] = {
    "absent model": (lambda _: None, {"model_version": "large"}, "run scripts/download_weights large"),
    "absent part": (remove("htdemucs"), MELODY, "melody needs htdemucs, which this server"),
    "absent diffusion": (
        remove("multiband-diffusion"), DIFFUSION, "needs multiband-diffusion, which this"
    ),
    "pointer": (pointer("melody/state_dict.bin"), MELODY, "melody/state_dict.bin is a Git LFS"),
    "pointer in a part": (
        pointer(MBD), DIFFUSION, "is a Git LFS pointer"
    ),
    "emptied folder": (
        remove("melody/state_dict.bin", "melody/compression_state_dict.bin"), MELODY, "no weights"
    ),
    "does not fit": (lacks_a_tensor, MELODY, HIDDEN),
    "another kind": (of_another_kind, DIFFUSION, HIDDEN),
    "a file elsewhere": (names_a_file_elsewhere, MELODY, HIDDEN),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_client_reads_no_folder_of_the_server(
    name: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, fields, words = CASES[name]
    service = Service(Settings(weights_dir=home, work_dir=tmp_path / "work", device="cpu"))
    service.start(str(home / "small"))
    change(home)
    with pytest.raises(ServiceError, match=words) as caught:
        asyncio.run(service.predict(FIELDS | fields, lambda name, value: None))
    said = str(caught.value)
    assert "operators-own" not in said and not re.search(r"(^|\s|['\"(])/", said)
    assert caught.value.__suppress_context__ and caught.value.__cause__ is None
    if "log says why" in words:
        assert "operators-own" in capsys.readouterr().err, "the log must name the file"


def test_a_client_reads_the_message_of_a_weights_error_only_if_it_is_for_clients() -> None:
    assert "/secret" not in str(for_client(WeightsError("/secret/x is missing.")))
    assert str(for_client(DamagedFileError("/secret/x is y.", for_client="x is y."))) == "x is y."
    for own in (InputError("prompt is 1."), GenerationError("The disk is full.")):
        assert for_client(own) is own


def test_a_traceback_is_in_the_servers_log_only_under_a_number_in_the_predictions(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cog assigns lines to predictions, and so to replies, by context variables."""
    prediction: contextvars.ContextVar[str] = contextvars.ContextVar("prediction", default="nobody")
    written: list[tuple[str, str]] = []

    class Routed:
        def write(self, text: str) -> int:
            written.append((prediction.get(), text))
            return len(text)

        def flush(self) -> None:
            pass

    monkeypatch.setattr(sys, "stdout", Routed())
    monkeypatch.setattr(sys, "stderr", Routed())
    prediction.set("mine")
    with pytest.raises(WeightsError) as caught:
        check_not_damaged(Path("/secret/x"))
    log_failure(caught.value)
    mine, others = ("".join(t for owner, t in written if owner == who) for who in ("mine", "nobody"))
    (number,) = re.findall(r"failure (\w{8}): the server's log has the cause", mine)
    assert "Traceback" not in mine and "/secret" not in mine
    assert f"failure {number}:\nTraceback" in others and "Error: /secret/x is missing" in others
