"""The order of one request, from valid fields to a file. Nothing else knows it."""

import json
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from musicgen_svc import __version__
from musicgen_svc.audio import read_clip
from musicgen_svc.codec import Codec
from musicgen_svc.errors import InputError
from musicgen_svc.export import write_audio
from musicgen_svc.generation import perform, write_score
from musicgen_svc.loader import Loader, Model
from musicgen_svc.loudness import normalize
from musicgen_svc.progress import Progress, StopFlag
from musicgen_svc.randomness import GlobalRandom
from musicgen_svc.request import Mode, Request
from musicgen_svc.ticks import Tick


@dataclass(frozen=True)
class Result:
    """One finished request."""

    path: Path
    metrics: dict[str, object]


class Pipeline:
    """Runs requests, one after the other, on the thread that owns the device."""

    def __init__(self, loader: Loader, *, tag_prompt: bool) -> None:
        self._loader = loader
        self._tag_prompt = tag_prompt

    def run(self, request: Request, stop: StopFlag, folder: Path) -> Result:
        """Carries out one request and writes its file into `folder`.

        Raises:
            ServiceError: with the sentence for the user.
            Stopped: the client cancelled.
        """
        stop.start_clock()
        with Progress(_shares(request), stop) as progress:
            if request.mode is Mode.ENCODE_DECODE:
                return self._encode_decode(request, progress, folder)
            return self._generate(request, progress, folder)

    def _generate(self, request: Request, progress: Progress, folder: Path) -> Result:
        random = GlobalRandom(request.seed, self._loader.device)
        with progress.stage("load"):
            if request.mode is Mode.MELODY:
                self._refuse_deaf_model(request)
            model = self._loader.model(request.model)
        codec = model.codec
        with progress.stage("condition") as tick:
            clip = _read_clip(request, codec, tick)
            continued = clip is not None and request.mode is Mode.CONTINUATION
            melody = clip.mean(0, keepdim=True) if clip is not None and not continued else None
            score = write_score(
                model,
                prompt=request.prompt,
                frames=int(request.duration_s * codec.frame_rate),
                melody=melody,
                clip_tokens=codec.encode(clip, tick) if clip is not None and continued else None,
                random=random,
                tick=tick,
            )
        with progress.stage("generate") as tick:
            generator = torch.Generator().manual_seed(request.seed)
            tokens, steps = perform(model, score, request.sampling, generator, tick)
        samples = self._decode(request, model.place, codec, tokens, random, progress)
        tags = self._tags(request, model)
        return _write(request, samples, codec.sample_rate, tags, steps, progress, folder)

    def _encode_decode(self, request: Request, progress: Progress, folder: Path) -> Result:
        random = GlobalRandom(request.seed, self._loader.device)
        with progress.stage("load"):
            checkpoint, codec = self._loader.codec()
        with progress.stage("condition") as tick:
            clip = _read_clip(request, codec, tick)
            assert clip is not None
            tokens = codec.encode(clip, tick)
        samples = self._decode(request, checkpoint, codec, tokens, random, progress)[:, : clip.shape[1]]
        tags = self._tags(request, None)
        return _write(request, samples, codec.sample_rate, tags, 0, progress, folder)

    def _decode(
        self, request: Request, checkpoint: Path, codec: Codec, tokens: torch.Tensor,
        random: GlobalRandom, progress: Progress,
    ) -> torch.Tensor:  # fmt: skip
        """Tokens [K, F] -> samples [C, F * hop], by exactly one decoder."""
        if not request.multi_band_diffusion:
            with progress.stage("decode") as tick:
                return codec.decode(tokens, tick)
        with progress.stage("load"):
            diffusion = self._loader.diffusion(checkpoint, codec)
        with progress.stage("decode") as tick, random.pinned():
            return diffusion.decode(tokens, tick)

    def _refuse_deaf_model(self, request: Request) -> None:
        if not self._loader.takes_melody(request.model):
            raise InputError(
                f"model_version {request.model!r} cannot follow a melody: use "
                f"{' or '.join(map(repr, self._loader.melody_models()))}, or set continuation to true."
            )

    def _tags(self, request: Request, model: Model | None) -> dict[str, str]:
        """What reproduces the file. No time, so that the same request gives the same bytes."""
        recipe: dict[str, object] = {
            "seed": request.seed,
            "model": request.model,
            "mode": request.mode.value,
            "version": __version__,
            "precision": "reference",
            "duration": request.duration_s,
            "multi_band_diffusion": request.multi_band_diffusion,
            "normalization_strategy": request.normalization,
        }
        if model is not None:
            recipe |= {"model_sha256": model.content_hash, "model_format": model.format} | asdict(
                request.sampling
            )
        if self._tag_prompt and request.prompt is not None:
            recipe["prompt"] = request.prompt
        return {"title": f"MusicGen {request.model} {request.seed}", "comment": json.dumps(recipe)}


def _read_clip(request: Request, codec: Codec, tick: Tick) -> torch.Tensor | None:
    """The selected part of the input, [C, T] at the codec's rate."""
    if request.input_audio is None:
        return None
    return read_clip(
        request.input_audio,
        sample_rate=codec.sample_rate,
        channels=codec.channels,
        start_s=request.start_s,
        end_s=request.end_s,
        tick=tick,
    ).samples


def _write(
    request: Request, samples: torch.Tensor, sample_rate: int, tags: dict[str, str], steps: int,
    progress: Progress, folder: Path,
) -> Result:  # fmt: skip
    with progress.stage("write") as tick:
        samples = normalize(samples.float().cpu(), sample_rate, request.normalization, tick=tick)
        name = f"musicgen-{request.model}-{request.seed}-{uuid.uuid4().hex[:8]}.{request.output_format}"
        write_audio(samples, sample_rate, folder / name, tags, tick=tick)
    metrics: dict[str, object] = {"audio_seconds": samples.shape[1] / sample_rate, "steps": steps}
    return Result(folder / name, metrics | progress.seconds)


def _shares(request: Request) -> dict[str, float]:
    """The stages in order, with the share of the time that each is expected to take."""
    decode = 60.0 if request.multi_band_diffusion else 8.0
    if request.mode is Mode.ENCODE_DECODE:
        return {"load": 5, "condition": 40, "generate": 0, "decode": max(decode, 40), "write": 5}
    condition = 3.0 if request.mode is Mode.TEXT else 10.0
    return {"load": 5, "condition": condition, "generate": 80, "decode": decode, "write": 2}
