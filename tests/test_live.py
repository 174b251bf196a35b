"""Live audio: its chunks are the whole preview in order, and the file and other requests do not change."""

import asyncio
import base64
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from fields import FIELDS
from random_encodec import encodec
from sounds import encode, tone

from musicgen_svc.audio.live_gain import LiveGain
from musicgen_svc.audiocraft_compat import InterleaveStereoCompressionModel
from musicgen_svc.engine.batch import Slot
from musicgen_svc.live import LiveAudio
from musicgen_svc.models.encodec import Codec
from musicgen_svc.models.encodec_stream import PIECE_FRAMES
from musicgen_svc.runtime.ticks import Tick, no_tick
from musicgen_svc.service import Service
from musicgen_svc.settings import Settings

Chunk = dict[str, Any]


def pcm(chunks: list[Chunk]) -> np.ndarray[Any, Any]:
    """The samples of all chunks as integers [T, C]. Checks that the chunks are complete and in order."""
    at, parts = 0, []
    for index, chunk in enumerate(chunks):
        assert (chunk["index"], chunk["offset"]) == (index, at)
        samples = np.frombuffer(base64.b64decode(chunk["pcm"]), "<i2").reshape(-1, chunk["channels"])
        assert len(samples)
        at += len(samples)
        parts.append(samples)
    return np.concatenate(parts)


@pytest.mark.parametrize("stereo", [False, True])
@pytest.mark.parametrize("step", [1, 7, 500])
def test_the_chunks_are_the_decoded_audio_at_its_level(stereo: bool, step: int) -> None:
    codec = Codec(InterleaveStereoCompressionModel(encodec()) if stereo else encodec())
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(codec.cardinality, (codec.codebooks, 450), generator=generator)
    held, holds, chunks = False, 0, []

    @contextmanager
    def hold() -> Iterator[Tick]:
        nonlocal held, holds
        held, holds = True, holds + 1
        yield no_tick
        held = False

    def send(chunk: Chunk) -> None:
        assert not held, "the device is free while a chunk is sent"
        chunks.append(chunk)

    live = LiveAudio(codec, hold, send)
    for start in range(0, 450, step):
        live.push(tokens[:, start : start + step])
    live.finish(450 * codec.hop - 100)

    gain, whole = LiveGain(codec.sample_rate), codec.decode(tokens)[:, :-100]
    lengths = [n * codec.hop for n in PIECE_FRAMES] + [60 * codec.hop - 100]
    expected = torch.cat([gain.apply(piece) for piece in torch.split(whole, lengths, 1)], 1)
    assert np.array_equal(pcm(chunks), (expected * 32767).round().T.numpy().astype(np.int16))
    assert [chunk["sample_rate"] for chunk in chunks] == [32_000] * 6
    assert holds <= 2 * len(chunks) + 2, "the device is not used for tokens that complete no chunk"


@pytest.fixture(scope="module")
def service(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Service:
    folder = tmp_path_factory.mktemp("work")
    made = Service(Settings(weights_dir=weights, work_dir=folder, device="cpu", output_grace_s=60))
    made.start(str(weights / "melody"))
    return made


def predict(service: Service, fields: dict[str, Any], send: Any = None) -> Path:
    return asyncio.run(service.predict(FIELDS | fields, lambda name, value: None, send_chunk=send))


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.wav"
    path.write_bytes(encode(tone(330.0, 2.505, 32_000), 32_000, "wav16"))
    return path


MODES: dict[str, dict[str, Any]] = {
    "text": {"duration": 3},
    "two windows": {"duration": 40},
    "melody": {"input_audio": True},
    "continuation": {"input_audio": True, "continuation": True},
    "encode-decode": {"input_audio": True, "model_version": "encode-decode"},
    "MultiBand Diffusion": {"multi_band_diffusion": True},
}


@pytest.mark.parametrize("mode", MODES)
def test_the_file_has_the_same_bytes_and_the_preview_its_length(
    service: Service, clip: Path, mode: str
) -> None:
    fields = MODES[mode] | ({"input_audio": clip} if "input_audio" in MODES[mode] else {})
    chunks: list[Chunk] = []
    live, other = predict(service, fields, chunks.append), predict(service, fields)
    assert live.read_bytes() == other.read_bytes()
    samples, rate = soundfile.read(live, dtype="float32", always_2d=True)
    heard = pcm(chunks) / 32768
    assert heard.shape == samples.shape and {chunk["sample_rate"] for chunk in chunks} == {rate}
    if mode != "MultiBand Diffusion":  # it is the same music, at another level
        assert np.corrcoef(heard[:, 0], samples[:, 0])[0, 1] > 0.95


def test_nothing_is_computed_for_a_request_that_nobody_hears(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[str] = []

    def count(owner: type, name: str) -> None:
        own = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: (counted.append(name), own(*args))[1])

    for owner, name in [(Slot, "final_frames"), (Codec, "stream"), (LiveAudio, "push"), (LiveGain, "apply")]:
        count(owner, name)
    predict(service, {"duration": 3})
    assert not counted
    predict(service, {"duration": 3}, lambda chunk: None)
    assert set(counted) == {"final_frames", "stream", "push", "apply"}
