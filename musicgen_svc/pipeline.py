"""The order of one request, from valid fields to a file. Nothing else knows it.

Requests run side by side, each on a thread of its own, and take turns at three things:

- The device. Loading, conditioning and decoding hold it, the engine holds it for each of its turns,
  and nobody uses it otherwise: its memory, the process's random state and a CUDA graph's recording
  thus have one thread to reckon with. Long work passes it on at a tick, every 0.1 s.
- The language model. One decodes at a time; requests for it run together, a request for another one
  waits until they have ended, and those that come later wait behind it. Encode-decode needs none.
- MultiBand Diffusion, from beginning to end: by far the most memory.
"""

import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from musicgen_svc import __version__
from musicgen_svc.audio import read_clip
from musicgen_svc.codec import Codec
from musicgen_svc.errors import InputError
from musicgen_svc.export import write_audio
from musicgen_svc.generation import perform, write_score
from musicgen_svc.loader import Loader
from musicgen_svc.loudness import normalize
from musicgen_svc.progress import Progress, StopFlag
from musicgen_svc.randomness import GlobalRandom
from musicgen_svc.request import Mode, Request
from musicgen_svc.ticks import Tick
from musicgen_svc.turns import Turns


@dataclass(frozen=True)
class Result:
    """One finished request."""

    path: Path
    metrics: dict[str, object]


@dataclass(frozen=True)
class Sound:
    """What a request made, before it is written."""

    samples: torch.Tensor
    """[C, T] on the CPU."""
    sample_rate: int
    tags: dict[str, str]
    steps: int
    """Of the engine."""


class Pipeline:
    """Runs requests, from any number of threads."""

    def __init__(self, loader: Loader, device_turn: Turns, *, slots: int, tag_prompt: bool) -> None:
        """`device_turn`: the one that the loader's engines take; `slots`: requests for one model at once."""
        self._loader = loader
        self._device_turn = device_turn
        self._model_turn = Turns(slots)
        self._diffusion_turn = Turns(1)
        self._tag_prompt = tag_prompt

    def run(self, request: Request, stop: StopFlag, folder: Path) -> Result:
        """Carries out one request and writes its file into `folder`.

        Raises:
            ServiceError: with the sentence for the user.
            Stopped: the client cancelled.
        """
        with Progress(_shares(request), stop) as progress:
            if request.mode is Mode.ENCODE_DECODE:
                stop.start_clock()
                sound = self._encode_decode(request, progress)
            else:
                self._refuse_what_no_wait_mends(request, progress)
                with self._queued(self._model_turn, progress, request.model):
                    stop.start_clock()
                    sound = self._generate(request, progress)
            return _write(request, sound, progress, folder)

    def _generate(self, request: Request, progress: Progress) -> Sound:
        random = GlobalRandom(request.seed, self._loader.device)
        with progress.stage("load") as tick, self._device_held(tick, random):
            model = self._loader.model(request.model)
            if request.multi_band_diffusion:  # refused before the work that it would decode
                self._loader.diffusion_weights(model.place, model.codec)
        codec = model.codec
        with progress.stage("condition") as tick:
            clip = _read_clip(request, codec, tick)
            continued = clip is not None and request.mode is Mode.CONTINUATION
            melody = clip.mean(0, keepdim=True) if clip is not None and not continued else None
            with self._device_held(tick, random) as tick:
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
        made_by = {
            "model_sha256": model.content_hash,
            "model_format": model.format,
            "precision": model.engine.precision,
            **asdict(request.sampling),
        }
        return Sound(samples, codec.sample_rate, self._tags(request, made_by), steps)

    def _encode_decode(self, request: Request, progress: Progress) -> Sound:
        random = GlobalRandom(request.seed, self._loader.device)
        with progress.stage("load") as tick, self._device_held(tick, random):
            checkpoint, codec = self._loader.codec()
            made_by = {"codebooks_sha256": codec.fingerprint()}
            if request.multi_band_diffusion:
                self._loader.diffusion_weights(checkpoint, codec)
        with progress.stage("condition") as tick:
            clip = _read_clip(request, codec, tick)
            assert clip is not None
            with self._device_held(tick, random) as tick:
                tokens = codec.encode(clip, tick)
        samples = self._decode(request, checkpoint, codec, tokens, random, progress)[:, : clip.shape[1]]
        return Sound(samples, codec.sample_rate, self._tags(request, made_by), 0)

    def _decode(
        self, request: Request, checkpoint: Path, codec: Codec, tokens: torch.Tensor,
        random: GlobalRandom, progress: Progress,
    ) -> torch.Tensor:  # fmt: skip
        """Tokens [K, F] -> samples [C, F * hop] on the CPU, by exactly one decoder."""
        if not request.multi_band_diffusion:
            with progress.stage("decode") as tick, self._device_held(tick, random) as tick:
                return codec.decode(tokens, tick).float().cpu()
        with self._queued(self._diffusion_turn, progress):
            with progress.stage("load") as tick, self._device_held(tick, random):
                diffusion = self._loader.diffusion(checkpoint, codec)
            with progress.stage("decode") as tick, self._device_held(tick, random) as tick, random.pinned():
                return diffusion.decode(tokens, tick).float().cpu()

    @contextmanager
    def _device_held(self, tick: Tick, random: GlobalRandom) -> Iterator[Tick]:
        """Holds the device. At the tick that it hands out others have their turn, if they wait for one."""
        with self._device_turn.taken(lambda: tick(0, 1)) as turn:

            def shared(done: int, total: int) -> None:
                tick(done, total)
                if turn.over:
                    with random.unpinned():
                        turn.pass_on(lambda: tick(done, total))

            yield shared

    @contextmanager
    def _queued(self, turns: Turns, progress: Progress, kind: str | None = None) -> Iterator[None]:
        """Holds a turn at something else; the wait for it, and only that, is the stage `queue`."""
        with ExitStack() as held:
            with progress.waiting() as tick:
                held.enter_context(turns.taken(lambda: tick(0, 1), kind))
            yield

    def _refuse_what_no_wait_mends(self, request: Request, progress: Progress) -> None:
        """Says that a model is absent or deaf before the request waits for it, and makes others wait."""
        with progress.waiting() as tick, self._device_turn.taken(lambda: tick(0, 1)):
            if self._loader.takes_melody(request.model) or request.mode is not Mode.MELODY:
                return
            able = " or ".join(map(repr, self._loader.melody_models()))
            raise InputError(
                f"model_version {request.model!r} cannot follow a melody: use {able}, "
                "or set continuation to true."
            )

    def _tags(self, request: Request, made_by: Mapping[str, object]) -> dict[str, str]:
        """What reproduces the file. No time, so that the same request gives the same bytes."""
        recipe: dict[str, object] = {
            "seed": request.seed,
            "model": request.model,
            "mode": request.mode.value,
            "version": __version__,
            "duration": request.duration_s,
            "multi_band_diffusion": request.multi_band_diffusion,
            "normalization_strategy": request.normalization,
            **made_by,
        }
        if request.input_audio is not None:
            recipe |= {"continuation_start": request.start_s, "continuation_end": request.end_s}
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


def _write(request: Request, sound: Sound, progress: Progress, folder: Path) -> Result:
    with progress.stage("write") as tick:
        samples = normalize(sound.samples, sound.sample_rate, request.normalization, tick=tick)
        name = f"musicgen-{request.model}-{request.seed}-{uuid.uuid4().hex[:8]}.{request.output_format}"
        write_audio(samples, sound.sample_rate, folder / name, sound.tags, tick=tick)
    seconds = samples.shape[1] / sound.sample_rate
    metrics: dict[str, object] = {"audio_seconds": seconds, "steps": sound.steps}
    return Result(folder / name, metrics | progress.seconds)


def _shares(request: Request) -> dict[str, float]:
    """The stages in order, with the share of the time that each is expected to take."""
    decode = 60.0 if request.multi_band_diffusion else 8.0
    if request.mode is Mode.ENCODE_DECODE:
        return {"queue": 0, "load": 5, "condition": 40, "generate": 0, "decode": max(decode, 40), "write": 5}
    condition = 3.0 if request.mode is Mode.TEXT else 10.0
    return {"queue": 0, "load": 5, "condition": condition, "generate": 80, "decode": decode, "write": 2}
