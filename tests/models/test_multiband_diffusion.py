"""MultiBand Diffusion: audiocraft's result for a mono piece; and long, stereo and silent pieces."""

import copy
import dataclasses
import os
import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from musicgen_svc.audiocraft_compat import SampleProcessor
from musicgen_svc.errors import Stopped, WeightsError
from musicgen_svc.models.diffusion_bands import Band, load_bands
from musicgen_svc.models.encodec import Codec
from musicgen_svc.models.multiband_diffusion import AHEAD, MultiBandDiffusion, _Count, in_pieces, plan
from musicgen_svc.runtime.ticks import no_tick

CPU = torch.device("cpu")
CARD, HOP, RATE = 400, 640, 32_000
EVALUATIONS = 4 * 20  # of a U-Net, for one channel in one window
Pretrained = Callable[[str], Any]


@pytest.fixture(scope="module")
def file(weights: Path) -> Path:
    return weights / "multiband-diffusion" / "mbd_musicgen_32khz.th"


@pytest.fixture(scope="module")
def bands(file: Path) -> list[Band]:
    return load_bands(file, CPU)


@pytest.fixture(scope="module")
def mono(pretrained: Pretrained) -> Codec:
    return Codec(pretrained("small").compression_model)


@pytest.fixture(scope="module")
def stereo(pretrained: Pretrained) -> Codec:
    return Codec(pretrained("stereo").compression_model)


def _tokens(codebooks: int, frames: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(CARD, (codebooks, frames), generator=torch.Generator().manual_seed(seed))


def _decode(diffusion: MultiBandDiffusion, tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return diffusion.decode(tokens, **kwargs)


def test_a_mono_piece_equals_audiocrafts(
    file: Path, bands: list[Band], mono: Codec, pretrained: Pretrained
) -> None:
    import typing
    from collections import defaultdict

    # This import must come first, because audiocraft's modules import each other in a circle.
    from audiocraft.models import MultiBandDiffusion as Theirs  # isort: skip
    from audiocraft.models.loaders import load_diffusion_models
    from audiocraft.models.multibanddiffusion import DiffusionProcess
    from audiocraft.modules.diffusion_schedule import NoiseSchedule
    from omegaconf import DictConfig
    from omegaconf.base import ContainerMetadata, Metadata
    from omegaconf.nodes import AnyNode

    known = [DictConfig, ContainerMetadata, Metadata, AnyNode, defaultdict, dict, int, typing.Any]
    with torch.serialization.safe_globals(known):
        models, processors, configs = load_diffusion_models(str(file), device="cpu")
    schedules = [
        NoiseSchedule(**config.schedule, sample_processor=processor, device="cpu")
        for processor, config in zip(processors, configs, strict=True)
    ]
    processes = [DiffusionProcess(m.eval(), s) for m, s in zip(models, schedules, strict=True)]
    tokens = _tokens(4, 40)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(7)
        expected = Theirs(processes, pretrained("small").compression_model).tokens_to_wav(tokens[None])[0]

    ours = _decode(MultiBandDiffusion(bands, mono), tokens)
    assert ours.std() > 0.02
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)


def test_each_stereo_channel_is_what_it_would_be_alone(bands: list[Band], mono: Codec, stereo: Codec) -> None:
    tokens = _tokens(8, 12)
    left, right = (_decode(MultiBandDiffusion(bands, mono), tokens[channel::2]) for channel in (0, 1))
    both = _decode(MultiBandDiffusion(bands, stereo), tokens)
    assert both.shape == (2, 12 * HOP)
    assert not torch.equal(left, right)
    assert torch.equal(both, torch.cat([left, right]))


def test_a_decode_moves_the_callers_generator_on(bands: list[Band], stereo: Codec) -> None:
    diffusion, tokens = MultiBandDiffusion(bands[:1], stereo), _tokens(8, 5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        first, second = diffusion.decode(tokens), diffusion.decode(tokens)
    assert torch.equal(first, _decode(diffusion, tokens))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("frames", [1, 2, 15, 16, 40])
def test_length_is_exact_and_no_window_is_longer_than_allowed(
    bands: list[Band], mono: Codec, frames: int
) -> None:
    seen: list[int] = []
    watched = [dataclasses.replace(band, unet=_Watched(band.unet, seen)) for band in bands]
    wav = _decode(MultiBandDiffusion(watched, mono, window_s=0.3), _tokens(4, frames))
    assert wav.shape == (1, frames * HOP)
    assert wav.isfinite().all()
    assert max(seen) <= 15 * HOP
    assert (max(seen) < frames * HOP) == (frames > 15)


class _Watched(nn.Module):
    """Records the lengths of a U-Net's inputs."""

    def __init__(self, unet: nn.Module, seen: list[int]) -> None:
        super().__init__()
        self._unet, self._seen = unet, seen

    def forward(self, x: torch.Tensor, step: torch.Tensor, condition: torch.Tensor) -> Any:
        self._seen.append(x.shape[-1])
        return self._unet(x, step, condition=condition)


@dataclasses.dataclass
class _Answer:
    sample: torch.Tensor


class _Constant(nn.Module):
    """A U-Net whose estimate is the mean of its latents, which differs between windows."""

    def __init__(self) -> None:
        super().__init__()
        self._anchor = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, step: torch.Tensor, condition: torch.Tensor) -> _Answer:
        return _Answer(condition.mean() + torch.zeros_like(x))


class _Ramp:
    """A silent codec whose latents rise by 1 per second."""

    sample_rate, hop, channels = RATE, HOP, 1

    def decode(self, tokens: torch.Tensor, tick: Any) -> torch.Tensor:
        return torch.zeros(1, tokens.shape[-1] * HOP)

    def latents(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens[None, :1].float() / 50


def test_windows_are_crossfaded_without_a_click() -> None:
    estimates: list[torch.Tensor] = []

    class Schedule:
        num_steps = 1000

        def generate_subsampled(self, model: Any, initial: Any, step_list: Any, condition: Any) -> Any:
            estimates.append(model(initial, 999, condition=condition).sample[0, 0])
            return estimates[-1].view_as(initial)

    band = Band(_Constant(), Schedule(), SampleProcessor(), RATE, dimension=1)  # type: ignore[arg-type]
    diffusion = MultiBandDiffusion([band], _Ramp(), window_s=0.4)  # type: ignore[arg-type]
    diffusion.decode(torch.full((1, 60), 50))
    diffusion.decode(torch.arange(60)[None])

    torch.testing.assert_close(estimates[0], torch.ones(60 * HOP))  # gains add up to 1
    rising = estimates[1].diff()
    windows = plan(60, 20, 5)
    assert len(windows) == 4
    assert rising.min() > -1e-6
    # A straight line from the value of one window to that of the next, over their overlap of 0.1 s.
    climb = max((sum(after) - sum(before)) / 2 / 50 for before, after in pairwise(windows))
    assert rising.max() < 1.01 * climb / (5 * HOP)


def test_a_long_piece_is_no_rougher_where_windows_meet(bands: list[Band], mono: Codec) -> None:
    wav = _decode(MultiBandDiffusion(bands, mono, window_s=0.4), _tokens(4, 60))[0]
    steps = wav.diff().abs()
    seams = {edge * HOP for window in plan(60, 20, 5) for edge in window} - {0, 60 * HOP}
    assert len(seams) == 6
    assert max(steps[seam - 2 : seam + 2].max() for seam in seams) < steps.std() * 6


@pytest.mark.parametrize(("window", "overlap"), [(4, 1), (50, 12), (40, 10), (3000, 100)])
def test_a_plan_covers_each_frame_once_or_twice(window: int, overlap: int) -> None:
    for frames in (*range(1, 300), window - 1, window, window + 1, 10 * window + 7):
        windows = plan(frames, window, overlap)
        cover = torch.zeros(frames)
        for start, stop in windows:
            assert 0 < stop - start <= window
            cover[start:stop] += 1
        assert (windows[0][0], windows[-1][1]) == (0, frames)
        assert set(cover.tolist()) <= {1, 2}
        assert cover.sum() == frames + overlap * (len(windows) - 1)


def test_filters_in_pieces_are_the_filters_in_one() -> None:
    from julius import SplitBands

    split, wav = SplitBands(RATE, 32), torch.randn(1, 1, 30_000)
    whole = split(wav)
    reach = split.lowpass.half_size
    pieces = torch.cat(list(in_pieces(split, wav, 7_000, reach)), -1)
    torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=0)
    without = torch.cat(list(in_pieces(split, wav, 7_000, 0)), -1)
    assert (without - whole).abs().max() > 1e-2


def test_a_piece_longer_than_the_filters_work_on_at_once(
    bands: list[Band], mono: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = _tokens(4, 40)
    whole = _decode(MultiBandDiffusion(bands, mono), tokens)
    monkeypatch.setattr("musicgen_svc.models.multiband_diffusion.PIECE_S", 0.3)
    pieces = _decode(MultiBandDiffusion(bands, mono), tokens)
    torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=1e-4)


class _Mute:
    """A codec with some silent channels."""

    def __init__(self, codec: Codec, silent: list[int]) -> None:
        self._codec, self._silent = codec, silent
        self.sample_rate, self.hop, self.channels = codec.sample_rate, codec.hop, codec.channels

    def decode(self, tokens: torch.Tensor, tick: Any) -> torch.Tensor:
        wav = self._codec.decode(tokens, tick)
        wav[self._silent] = 0
        return wav

    def latents(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._codec.latents(tokens)


def test_a_silent_channel_stays_silent_and_does_not_change_the_other(
    bands: list[Band], stereo: Codec
) -> None:
    tokens = _tokens(8, 6)
    both = _decode(MultiBandDiffusion(bands, stereo), tokens)
    half = _decode(MultiBandDiffusion(bands, _Mute(stereo, [1])), tokens)  # type: ignore[arg-type]
    assert torch.equal(half[0], both[0])
    assert not half[1].any()


class _Silent(nn.Module):
    """A U-Net and a schedule that give a silent band."""

    num_steps = 1000

    def __init__(self) -> None:
        super().__init__()
        self._anchor = nn.Parameter(torch.zeros(1))

    def generate_subsampled(self, initial: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.zeros_like(initial)


def test_bands_that_the_models_left_silent_give_no_nan(mono: Codec) -> None:
    silent = _Silent()
    band = Band(silent, silent, SampleProcessor(), RATE, dimension=16)  # type: ignore[arg-type]
    wav = _decode(MultiBandDiffusion([band], mono), _tokens(4, 6))
    assert torch.equal(wav, torch.zeros(1, 6 * HOP))


def test_every_evaluation_ticks_and_progress_only_rises(
    bands: list[Band], stereo: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("musicgen_svc.models.slices.LARGE", 1)  # as the layers of a real model are
    ticks: list[tuple[int, int]] = []
    diffusion = MultiBandDiffusion(bands, stereo, window_s=0.3)
    _decode(diffusion, _tokens(8, 20), tick=lambda done, total: ticks.append((done, total)))
    total = 2 * 2 * EVALUATIONS  # channels and windows
    assert {t for _, t in ticks} == {total}
    assert sorted({done for done, _ in ticks}) == list(range(total + 1))
    assert ticks == sorted(ticks)
    per_evaluation = Counter(done for done, _ in ticks)
    assert all(per_evaluation[done] > 40 for done in range(total)), "layers do not report"


@pytest.mark.parametrize("stop_at", [0, 3])
def test_a_tick_that_raises_ends_it_within_one_evaluation(
    bands: list[Band], mono: Codec, stop_at: int
) -> None:
    seen: list[int] = []
    watched = [dataclasses.replace(band, unet=_Watched(band.unet, seen)) for band in bands]

    def tick(done: int, total: int) -> None:
        if done >= stop_at:
            raise Stopped

    diffusion = MultiBandDiffusion(watched, mono)
    with pytest.raises(Stopped):
        _decode(diffusion, _tokens(4, 6), tick=tick)
    assert len(seen) == stop_at
    assert _decode(diffusion, _tokens(4, 6)).isfinite().all()


class _Typed(nn.Module):
    """Records the dtypes of a U-Net's inputs and of its convolutions' results."""

    def __init__(self, unet: nn.Module, seen: set[Any]) -> None:
        super().__init__()
        self._unet, self._seen = unet, seen
        for part in unet.modules():
            if isinstance(part, nn.Conv1d):
                part.register_forward_hook(lambda _, __, made: seen.add(made.dtype))

    def forward(self, x: torch.Tensor, step: torch.Tensor, condition: torch.Tensor) -> Any:
        self._seen.add((x.dtype, step.dtype, step.device.type))
        return self._unet(x, step, condition=condition)


def test_the_unets_compute_in_half_and_the_chain_does_not(
    file: Path, mono: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tested on a CPU, where autocast does the same as on a GPU if oneDNN is off."""
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    seen: set[Any] = set()
    band = load_bands(file, CPU)[0]
    bands = [dataclasses.replace(band, unet=_Typed(band.unet, seen))]
    half, whole = (
        _decode(MultiBandDiffusion(bands, mono, half=half), _tokens(4, 6)) for half in (True, None)
    )
    assert seen == {torch.float16, torch.float32, (torch.float32, torch.long, "cpu")}
    assert half.dtype == torch.float32
    error = (half - whole).std() / whole.std()
    assert 0 < error < 0.05


def test_nothing_in_the_chain_waits_for_the_device(file: Path) -> None:
    """On the meta device tensors have no values, so code that reads one fails."""

    class Shape:
        sample_rate, hop, channels = RATE, HOP, 1

    meta = torch.device("meta")
    band = load_bands(file, meta)[0]
    diffusion = MultiBandDiffusion([band], Shape())  # type: ignore[arg-type]
    latents = torch.empty(1, band.dimension, 2, device=meta)
    windows, count = [(0, 2)], _Count(no_tick, 1, meta)
    with torch.no_grad():
        assert diffusion._diffuse(latents, windows, count).shape == (1, 1, 2 * HOP)
        with pytest.raises(RuntimeError, match="meta"):
            waits = dataclasses.replace(band, schedule=_moved(band.schedule, meta))
            MultiBandDiffusion([waits], Shape())._diffuse(latents, windows, count)  # type: ignore[arg-type]


def _moved(schedule: Any, device: torch.device) -> Any:
    """Returns a copy of the schedule with its numbers on the device, as in audiocraft."""
    moved = copy.copy(schedule)
    moved.betas = schedule.betas.to(device)
    return moved


def test_the_host_is_only_a_little_ahead_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[int] = []

    class Event:
        made = 0

        def __init__(self) -> None:
            Event.made += 1
            self._number = Event.made

        def record(self, stream: str) -> None:
            assert stream == "the stream"

        def synchronize(self) -> None:
            waited.append(self._number)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the stream")
    done: list[int] = []
    count = _Count(lambda at, _: done.append(at), 9, torch.device("cuda"))
    for evaluation in range(1, 6):
        count()
        assert waited == list(range(1, evaluation - AHEAD + 1))
    assert done == [1, 2, 3, 4, 5]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_it_never_waits_and_gives_the_same_samples(file: Path, mono: Codec) -> None:
    gpu = torch.device("cuda")
    latents = mono.latents(_tokens(4, 40)).float()[:1].to(gpu)
    wavs = []
    for half in (None, False):
        diffusion = MultiBandDiffusion(load_bands(file, gpu), mono, half=half)
        with torch.no_grad():
            for mode in ("default", "error"):  # the first run chooses algorithms, and may wait
                torch.manual_seed(7)
                torch.cuda.set_sync_debug_mode(mode)
                try:
                    wavs.append(diffusion._diffuse(latents, [(0, 25), (15, 40)], _Count(no_tick, 1, gpu)))
                finally:
                    torch.cuda.set_sync_debug_mode("default")
    half, whole = wavs[1], wavs[3]
    assert 0 < (half - whole).std() < 0.05 * whole.std()


class _Malice:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._path),)


@pytest.mark.parametrize("where", ["package", "cfg"])
def test_a_pickle_with_code_is_refused_without_running_it(file: Path, tmp_path: Path, where: str) -> None:
    mark = tmp_path / "mark"
    package: dict[Any, Any] = {"sample_rate": RATE, "n_bands": 1, 0: {"cfg": _Malice(mark)}}
    torch.save(package if where == "cfg" else _Malice(mark), tmp_path / "evil.th")
    with pytest.raises(WeightsError, match=re.escape(str(tmp_path / "evil.th"))):
        load_bands(tmp_path / "evil.th", CPU)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"best_state": {}}, "is not a MultiBand Diffusion checkpoint: it has no 'sample_rate'"),
        ({"sample_rate": RATE, "n_bands": 0}, "has n_bands 0; it must be an integer from 1 to 16"),
        ({"sample_rate": RATE, "n_bands": 10**7}, "has n_bands 10000000; it must be an integer"),
        (
            {"sample_rate": RATE, "n_bands": 1, 0: {}},
            "is not a MultiBand Diffusion checkpoint: it has no 'cfg'",
        ),
        (
            {"sample_rate": RATE, "n_bands": 1, 0: {"cfg": {}}},
            "has None for diffusion_unet; it must be a mapping",
        ),
        ([1, 2], "is not a MultiBand Diffusion checkpoint: list indices"),
    ],
)
def test_another_file_is_refused_with_a_sentence(tmp_path: Path, content: Any, reason: str) -> None:
    torch.save(content, tmp_path / "other.th")
    expected = rf"other\.th {reason}"
    with pytest.raises(WeightsError, match=expected) as caught:
        load_bands(tmp_path / "other.th", CPU)
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit_their_configuration_are_refused(file: Path, tmp_path: Path) -> None:
    from musicgen_svc.checkpoints.unpickle import load_pickle

    package = load_pickle(file)
    package[2]["cfg"].diffusion_unet.hidden = 8
    torch.save(package, tmp_path / "misfit.th")
    with pytest.raises(WeightsError, match=r"misfit\.th is not .* size mismatch for \w+") as caught:
        load_bands(tmp_path / "misfit.th", CPU)
    assert "\n" not in str(caught.value)


def test_a_codec_that_the_bands_do_not_fit_is_refused(bands: list[Band], mono: Codec) -> None:
    other_rate = [dataclasses.replace(band, sample_rate=24_000) for band in bands]
    with pytest.raises(WeightsError, match="24000 Hz; this one is at 32000 Hz"):
        MultiBandDiffusion(other_rate, mono)
    other_latents = [dataclasses.replace(band, dimension=128) for band in bands]
    with pytest.raises(WeightsError, match="128 latent dimensions per channel; this one has 16 for 1"):
        MultiBandDiffusion(other_latents, mono).decode(_tokens(4, 5))


@pytest.mark.parametrize("call", ["${oc.env:SECRET}", "${oc.${half}:SECRET}", "\\${oc.env:SECRET}"])
def test_a_configuration_cannot_read_the_environment(
    call: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value of the environment would get into a message or into the model."""
    from musicgen_svc.checkpoints.unpickle import load_pickle

    monkeypatch.setenv("SECRET", "hunter2")
    package = load_pickle(file)
    for band in range(4):
        package[band]["cfg"]["half"] = "env"
        package[band]["cfg"].schedule["repartition"] = call
    torch.save(package, tmp_path / "curious.th")
    with pytest.raises(WeightsError, match=r"repartition .*; it must be") as refused:
        load_bands(tmp_path / "curious.th", CPU)
    assert "hunter2" not in str(refused.value)
