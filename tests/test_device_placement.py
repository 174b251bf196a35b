"""Models and requests on a pretend GPU: all tensors are on it, nothing waits for it unnecessarily, and the
numbers are those of a CPU."""

import base64
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from fields import FIELDS
from sounds import noise, tone, written
from torch import Tensor, nn

from musicgen_svc.audiocraft_compat import CompressionModel
from musicgen_svc.engine.static import StaticBatch
from musicgen_svc.loading import warm_up
from musicgen_svc.loading.loader import Loader
from musicgen_svc.loading.opener import Opener
from musicgen_svc.loading.parts import codec_spec, text_spec
from musicgen_svc.models.conditioners import MELODY, TEXT
from musicgen_svc.models.diffusion_bands import Band, load_bands
from musicgen_svc.models.encodec import LONGEST_PIECE, Codec
from musicgen_svc.models.multiband_diffusion import MultiBandDiffusion
from musicgen_svc.models.t5 import T5Encoder
from musicgen_svc.pipeline import Pipeline, stage_shares
from musicgen_svc.request import Request
from musicgen_svc.runtime.fair_queue import FairQueue
from musicgen_svc.runtime.progress import Progress, StopFlag
from musicgen_svc.runtime.randomness import GlobalRandom
from musicgen_svc.settings import Settings
from musicgen_svc.weights.catalog import read_catalog
from musicgen_svc.weights.paths import FINETUNED, Weights
from tests.fixtures.pretend_gpu import DEVICE, PretendGpu, pretend_gpu

RATE_HZ = 32_000
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendGpu]:
    def type_of(thing: Any) -> type:
        return Tensor if isinstance(thing, Tensor) else type(thing)

    # The U-Net compares the type of its step with `Tensor`, and would not accept a subclass.
    monkeypatch.setattr("audiocraft.models.unet.type", type_of, raising=False)
    # Two of diffusion's twenty evaluations are enough: one after which noise is added, and the last one.
    monkeypatch.setattr(Band, "steps", property(lambda band: [band.schedule.num_steps - 1, 500, 0]))
    monkeypatch.setattr(warm_up, "SECONDS", 1)
    with pretend_gpu(monkeypatch) as found:
        yield found


def loader(
    weights: Path, name: str, device: torch.device, turn: FairQueue | None = None, **settings: Any
) -> Loader:
    found = Weights.at(weights, read_catalog(), str(weights / name))
    return Loader(found, device, Settings(**settings), turn)


def parts_of(weights: Path, name: str, device: torch.device) -> tuple[CompressionModel, T5Encoder]:
    """Builds the codec and T5 of a model as the loader builds them."""
    found = Weights.at(weights, read_catalog(), str(weights / name))
    opened = Opener(found, 1.0).open(FINETUNED)
    given = found, opened, opened.config(), device
    return codec_spec(*given).build(), text_spec(*given).build().encoder


def codec_of(weights: Path, name: str, device: torch.device, longest_piece: int = LONGEST_PIECE) -> Codec:
    return Codec(parts_of(weights, name, device)[0], longest_piece)


def tokens_of(codec: Codec, frames: int) -> Tensor:
    draw = torch.Generator().manual_seed(3)
    return torch.randint(codec.cardinality, (codec.codebooks, frames), generator=draw)


@contextmanager
def waits_counted(gpu: PretendGpu) -> Iterator[Counter[str]]:
    """Context manager: counts the operations for which the host waits. The counter is filled at its end."""
    gpu.waits.clear()
    counted = Counter[str]()
    yield counted
    counted.update(gpu.waits)


def dtypes_and_devices(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.device, torch.Size]]:
    return {name: (tensor.dtype, tensor.device, tensor.shape) for name, tensor in tensors.items()}


def test_weights_have_the_dtypes_and_the_device_that_audiocraft_gives_them(
    gpu: PretendGpu, weights: Path, all_weights_kept: None
) -> None:
    from audiocraft.models.musicgen import MusicGen

    ours = loader(weights, "melody", GPU).start()
    with (
        warnings.catch_warnings()
    ):  # of torch's older weight norm, and of an autocast to float32, which does nothing
        warnings.simplefilter("ignore")
        theirs = MusicGen.get_pretrained(str(weights / "melody"), device="cuda")
    assert dtypes_and_devices(ours.engine.decoder.lm.state_dict()) == dtypes_and_devices(
        theirs.lm.state_dict()
    )
    codec, t5 = parts_of(weights, "melody", GPU)
    assert dtypes_and_devices(codec.state_dict()) == dtypes_and_devices(theirs.compression_model.state_dict())
    mine, their = ours.conditioner.conditioners, theirs.lm.condition_provider.conditioners
    chromas = (conditioners[MELODY].chroma for conditioners in (mine, their))
    assert dtypes_and_devices(dict(next(chromas).named_buffers())) == dtypes_and_devices(
        dict(next(chromas).named_buffers())
    )
    types = {(weight.dtype, weight.device) for weight in t5.parameters()}
    assert types == {(weight.dtype, weight.device) for weight in their[TEXT].t5.parameters()}


def test_conditions_are_those_of_a_cpu(gpu: PretendGpu, weights: Path) -> None:
    melody = torch.from_numpy(noise(1.0, RATE_HZ))
    given = []
    for device in (CPU, GPU):
        model = loader(weights, "melody", device).start()
        with GlobalRandom(3, device).pinned():
            given.append(model.conditioner.text("a waltz") | model.conditioner.melody(melody))
    here, there = given
    for name, (embedding, mask) in there.items():
        assert embedding.device == mask.device == DEVICE
        torch.testing.assert_close(embedding.cpu(), here[name][0], atol=1e-4, rtol=1e-4)
        assert torch.equal(mask.cpu(), here[name][1])


@pytest.mark.parametrize("name", ["hf-codec", "stereo"])
def test_a_codec_waits_once_per_piece_only(gpu: PretendGpu, weights: Path, name: str) -> None:
    here, there = (codec_of(weights, name, device) for device in (CPU, GPU))
    wav = torch.from_numpy(noise(2.0, RATE_HZ, channels=here.channels))
    tokens = there.encode(wav)
    assert tokens.device == DEVICE and torch.equal(tokens.cpu(), here.encode(wav))
    samples, expected = there.decode(tokens), here.decode(tokens.cpu())
    assert samples.device == DEVICE
    torch.testing.assert_close(samples.cpu(), expected, atol=1e-4, rtol=1e-4)
    on_gpu, in_pieces = wav.to(GPU), codec_of(weights, name, GPU, longest_piece=34)
    with waits_counted(gpu) as looked_up:  # it waits to see whether all tokens are in the codebooks
        there.latents(tokens)
    for codec, waits in ((there, Counter[str]()), (in_pieces, Counter(synchronize=3))):
        with waits_counted(gpu) as encoding:
            codec.encode(on_gpu)
        with waits_counted(gpu) as decoding:
            codec.decode(tokens)
        assert (encoding, decoding) == (waits, waits + looked_up)


def test_an_lstms_weights_are_joined_where_they_are_used(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuDNN needs them in one piece of memory. Otherwise it copies them, and warns, in every call."""
    joined: dict[nn.Module, list[Any]] = {}
    monkeypatch.setattr(
        nn.LSTM, "flatten_parameters", lambda self: joined.update({self: list(self.parameters())})
    )
    for name in ("small", "hf-codec"):
        lstms = [part for part in parts_of(weights, name, CPU)[0].modules() if isinstance(part, nn.LSTM)]
        assert len(lstms) == 2
        for lstm in lstms:
            assert [*map(id, joined[lstm])] == [*map(id, lstm.parameters())]


def test_diffusion_draws_on_the_gpu_and_never_waits_for_it(gpu: PretendGpu, weights: Path) -> None:
    """It waits only where the codec does, which gives it the latents and the levels of the bands."""
    file = weights / "multiband-diffusion" / "mbd_musicgen_32khz.th"
    codecs = {device: codec_of(weights, "small", device) for device in (CPU, GPU)}
    tokens = tokens_of(codecs[CPU], 9)
    wavs = []
    for device, half in ((CPU, False), (GPU, False), (GPU, None)):
        codec = codecs[device]
        window_s = 6 / codec.frame_rate  # two windows
        diffusion = MultiBandDiffusion(load_bands(file, device)[1:2], codec, window_s, half=half)
        with waits_counted(gpu) as codec_waits:
            samples = codec.decode(tokens)
            codec.latents(tokens)
        with GlobalRandom(3, device).pinned(), waits_counted(gpu) as waits:
            wav = diffusion.decode(tokens)
        assert waits == codec_waits and wav.device == samples.device
        wavs.append(wav.cpu())
    here, there, half = wavs
    torch.testing.assert_close(there, here, atol=1e-4, rtol=1e-4)
    assert 0 < (half - here).std() < 0.05 * here.std()


def test_both_channels_are_diffused_from_the_same_noise(gpu: PretendGpu, weights: Path) -> None:
    file = weights / "multiband-diffusion" / "mbd_musicgen_32khz.th"
    codec = loader(weights, "stereo", GPU).start().codec
    one = torch.randint(codec.cardinality, (4, 3), generator=torch.Generator().manual_seed(3))
    both = one.repeat_interleave(2, dim=0)
    wav = MultiBandDiffusion(load_bands(file, GPU)[:1], codec, half=False).decode(both)
    assert wav.device == DEVICE and wav.std() > 0
    assert torch.equal(wav[0], wav[1])


@pytest.mark.parametrize(("settings", "on"), [({}, True), ({"cuda_graphs": "off"}, False)])
def test_steps_are_recorded_unless_an_operator_turns_that_off(
    settings: dict[str, bool], on: bool, gpu: PretendGpu, weights: Path
) -> None:
    batch = loader(weights, "small", GPU, **settings).start().engine.batch
    assert isinstance(batch, StaticBatch) and batch.graphed.enabled == on


def test_a_whole_request_runs(gpu: PretendGpu, weights: Path, tmp_path: Path) -> None:
    turn = FairQueue(1)
    pipeline = Pipeline(loader(weights, "melody", GPU, turn), turn, tag_prompt=False)
    clip = tmp_path / "clip"
    clip.write_bytes(written(tone(440, 1.5, RATE_HZ), RATE_HZ))
    request = Request.from_fields(FIELDS | {"input_audio": clip, "multi_band_diffusion": True}, 600)
    with Progress(stage_shares(request), StopFlag(1000)) as progress:
        result = pipeline.run(request, progress, tmp_path)
    samples, rate = soundfile.read(result.path)
    assert (len(samples), rate) == (RATE_HZ, RATE_HZ) and samples.std() > 0.01


def test_a_live_request_runs(gpu: PretendGpu, weights: Path, tmp_path: Path) -> None:
    """Its frames are copied from the GPU while its thread holds the device, and so are its samples."""
    turn = FairQueue(1)
    pipeline = Pipeline(loader(weights, "melody", GPU, turn), turn, tag_prompt=False)
    clip = tmp_path / "clip"
    clip.write_bytes(written(tone(440, 1.5, RATE_HZ), RATE_HZ))
    fields = FIELDS | {"input_audio": clip, "continuation": True}
    request, chunks = Request.from_fields(fields, 600), list[dict[str, object]]()
    with Progress(stage_shares(request), StopFlag(1000)) as progress:
        result = pipeline.run(request, progress, tmp_path, chunks.append)
    samples, _ = soundfile.read(result.path, dtype="float32")
    heard = torch.frombuffer(
        bytearray(b"".join(base64.b64decode(str(chunk["pcm"])) for chunk in chunks)), dtype=torch.int16
    )
    assert len(chunks) > 1 and len(heard) == len(samples) == 2.5 * RATE_HZ
    pair = torch.stack([heard.float(), torch.from_numpy(samples)])
    assert torch.corrcoef(pair)[0, 1] > 0.95
