"""The order of one request's stages, from valid fields to a file. No other module knows it.

Requests run at the same time, each on a thread of its own. The callers see to it that those which generate at
the same time are for the same language model. Requests queue for two resources:

- The device. Loading, conditioning and decoding hold it, and the engine holds it while it computes. Nothing
  uses the device without holding it, so only one thread at a time changes its memory or the process's random
  state, or records a CUDA graph. Long work yields the device every 0.1 s, at a tick.
- MultiBand Diffusion, which one request holds from its loading to its result, because it needs by far the
  most memory.
"""

import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from musicgen_svc import __version__
from musicgen_svc.audio.loudness import normalize
from musicgen_svc.audio.reading import read_clip
from musicgen_svc.audio.writing import write_audio
from musicgen_svc.errors import InputError
from musicgen_svc.generation import generate, prepare
from musicgen_svc.live import LiveAudio, SendChunk
from musicgen_svc.loading.loader import Loader
from musicgen_svc.models.encodec import Codec
from musicgen_svc.request import Mode, Request
from musicgen_svc.runtime.fair_queue import FairQueue
from musicgen_svc.runtime.progress import Progress
from musicgen_svc.runtime.randomness import GlobalRandom
from musicgen_svc.runtime.threads import use_threads
from musicgen_svc.runtime.ticks import Tick


@dataclass(frozen=True)
class Result:
    """The output file of a finished request, and what Cog reports with it."""

    path: Path
    audio_seconds: float
    steps: int
    """How many steps the engine took."""
    stage_seconds: Mapping[str, float]

    @property
    def metrics(self) -> dict[str, object]:
        """All numbers by the names under which a client reads them."""
        return {"audio_seconds": self.audio_seconds, "steps": self.steps, **self.stage_seconds}


@dataclass(frozen=True)
class Sound:
    """The audio that a request made, before its level is set and it is written."""

    samples: torch.Tensor
    """[C, T] on the CPU."""
    sample_rate: int
    tags: dict[str, str]
    steps: int
    """How many steps the engine took."""


@dataclass(frozen=True)
class Run:
    """One request while it runs, with what all of its stages need."""

    request: Request
    progress: Progress
    random: GlobalRandom
    """The request's streams, for code that draws from the global generators."""
    device_queue: FairQueue
    send_chunk: SendChunk | None
    """Sends the audio to a client that hears it while it is generated; None: no client does."""

    @contextmanager
    def stage_on_device(self, name: str) -> Iterator[Tick]:
        """Context manager of a stage all of which uses the device. Yields the tick of `on_device`."""
        with self.progress.stage(name) as tick, self.on_device(tick) as device_tick:
            yield device_tick

    @contextmanager
    def on_device(self, tick: Tick) -> Iterator[Tick]:
        """Context manager that holds the device, and yields a tick for the work that uses it.

        At this tick the device is yielded, as its turn is over, to other requests that wait for it.

        Args:
            tick: of the stage; is called by the tick that is yielded.
        """
        with self.device_queue.acquire(self.progress.check) as turn:

            def device_tick(done: int, total: int) -> None:
                tick(done, total)
                if turn.over:
                    with self.random.unpinned():
                        turn.yield_turn(self.progress.check)

            yield device_tick

    def read_clip(self, codec: Codec, tick: Tick) -> torch.Tensor | None:
        """Reads the selected part of `input_audio`: [C, T] at the codec's sample rate. None: no file."""
        if self.request.input_audio is None:
            return None
        return read_clip(
            self.request.input_audio,
            sample_rate=codec.sample_rate,
            channels=codec.channels,
            start_s=self.request.start_s,
            end_s=self.request.end_s,
            tick=tick,
        )

    def preview(self, codec: Codec) -> LiveAudio | None:
        """Returns the preview that the client hears, or None if no client does."""
        if self.send_chunk is None:
            return None
        return LiveAudio(codec, lambda: self.on_device(lambda *_: self.progress.check()), self.send_chunk)


class Pipeline:
    """Runs requests. Its `run` may be called from several threads at once."""

    def __init__(self, loader: Loader, device_queue: FairQueue, *, tag_prompt: bool) -> None:
        """Makes a pipeline without loading anything.

        Args:
            loader: what gives the models.
            device_queue: the queue for the device that the loader's engines use too.
            tag_prompt: whether the output's tags include the prompt.
        """
        self._loader = loader
        self._device_queue = device_queue
        self._diffusion_queue = FairQueue(1)
        self._tag_prompt = tag_prompt

    def check(self, request: Request) -> None:
        """Fails before the request waits for its model, if the model is missing or takes no melody.

        Raises:
            InputError: the model takes no melody.
            WeightsError: the model is missing, or its configuration cannot be read.
        """
        if request.mode is Mode.ENCODE_DECODE:
            return
        with self._device_queue.acquire_next():
            takes_melody = self._loader.takes_melody(request.model)  # raises if there is no such model
            if takes_melody or request.mode is not Mode.MELODY:
                return
            able = " or ".join(map(repr, self._loader.melody_models()))
            raise InputError(
                f"model_version {request.model!r} cannot follow a melody: use {able}, "
                "or set continuation to true."
            )

    def run(
        self, request: Request, progress: Progress, folder: Path, send_chunk: SendChunk | None = None
    ) -> Result:
        """Runs one request and writes its file.

        Args:
            request: what to do; `check` has accepted it.
            progress: of this request, with the stages of `stage_shares`. Its stop flag ends the request.
            folder: where the file goes.
            send_chunk: sends the audio to a client that hears it while it is generated; None: no client does,
                and nothing is computed for it. The file is the same.

        Raises:
            ServiceError: with the sentence for the user.
            Stopped: the client cancelled.
        """
        use_threads(self._loader.threads.most)  # until the model is known
        random = GlobalRandom(request.seed, self._loader.device)
        run = Run(request, progress, random, self._device_queue, send_chunk)
        sound = self._encode_decode(run) if request.mode is Mode.ENCODE_DECODE else self._generate(run)
        return _write(run, sound, folder)

    def _generate(self, run: Run) -> Sound:
        """Runs a request that generates: text, melody or continuation."""
        request = run.request
        with run.stage_on_device("load"):
            model = self._loader.model(request.model)
            use_threads(model.threads)
            if request.multi_band_diffusion:  # checked now, so that no work is lost
                self._loader.diffusion_weights(model.path, model.codec)
        codec = model.codec
        with run.progress.stage("condition") as tick:
            clip = run.read_clip(codec, tick)
            continued = clip is not None and request.mode is Mode.CONTINUATION
            melody = clip.mean(0, keepdim=True) if clip is not None and not continued else None
            with run.on_device(tick) as device_tick:
                plan = prepare(
                    model,
                    prompt=request.prompt,
                    frames=int(request.duration_s * codec.frame_rate),
                    melody=melody,
                    clip_tokens=codec.encode(clip, device_tick) if clip is not None and continued else None,
                    random=run.random,
                    tick=device_tick,
                )
        with run.progress.stage("generate") as tick:
            generator = torch.Generator().manual_seed(request.seed)
            preview = run.preview(codec)
            on_frames = preview.push if preview else None
            tokens, steps = generate(model, plan, request.sampling, generator, tick, on_frames)
            if preview is not None:
                preview.finish()
        samples = self._decode(run, model.path, codec, tokens)
        provenance = {
            "model_sha256": model.content_hash,
            "model_format": model.format,
            "precision": model.engine.precision,
            **asdict(request.sampling),
        }
        return Sound(samples, codec.sample_rate, self._tags(request, provenance), steps)

    def _encode_decode(self, run: Run) -> Sound:
        """Runs a request that encodes the clip to tokens and decodes them again, without a language model."""
        with run.stage_on_device("load"):
            checkpoint, codec = self._loader.codec()
            use_threads(self._loader.threads.for_model(codec.parameter_count))
            provenance = {"codebooks_sha256": codec.fingerprint()}
            if run.request.multi_band_diffusion:
                self._loader.diffusion_weights(checkpoint, codec)
        with run.progress.stage("condition") as tick:
            clip = run.read_clip(codec, tick)
            assert clip is not None
            with run.on_device(tick) as device_tick:
                tokens = codec.encode(clip, device_tick)
        preview = run.preview(codec)
        if preview is not None:
            with run.progress.stage("generate"):  # without a preview this stage is empty
                preview.push(tokens)
                preview.finish(clip.shape[1])
        samples = self._decode(run, checkpoint, codec, tokens)[:, : clip.shape[1]]
        return Sound(samples, codec.sample_rate, self._tags(run.request, provenance), 0)

    def _decode(self, run: Run, checkpoint: Path, codec: Codec, tokens: torch.Tensor) -> torch.Tensor:
        """Decodes tokens [K, F] to samples [C, F * hop] on the CPU, with EnCodec or MultiBand Diffusion."""
        if not run.request.multi_band_diffusion:
            with run.stage_on_device("decode") as tick:
                return codec.decode(tokens, tick).float().cpu()
        with self._diffusion_held(run.progress):
            with run.stage_on_device("load"):
                diffusion = self._loader.diffusion(checkpoint, codec)
            with run.stage_on_device("decode") as tick, run.random.pinned():
                return diffusion.decode(tokens, tick).float().cpu()

    @contextmanager
    def _diffusion_held(self, progress: Progress) -> Iterator[None]:
        """Context manager that holds MultiBand Diffusion. Only the wait for it is the stage `queue`."""
        with ExitStack() as held:
            with progress.waiting():
                held.enter_context(self._diffusion_queue.acquire(progress.check))
            yield

    def _tags(self, request: Request, provenance: Mapping[str, object]) -> dict[str, str]:
        """Returns the tags of the file: a title, and as JSON all that is needed to make the file again.

        There is no time in it, so the same request gives the same bytes.
        """
        comment: dict[str, object] = {
            "seed": request.seed,
            "model": request.model,
            "mode": request.mode.value,
            "version": __version__,
            "duration": request.duration_s,
            "multi_band_diffusion": request.multi_band_diffusion,
            "normalization_strategy": request.normalization,
            **provenance,
        }
        if request.input_audio is not None:
            comment |= {"continuation_start": request.start_s, "continuation_end": request.end_s}
        if self._tag_prompt and request.prompt is not None:
            comment["prompt"] = request.prompt
        return {"title": f"MusicGen {request.model} {request.seed}", "comment": json.dumps(comment)}


def _write(run: Run, sound: Sound, folder: Path) -> Result:
    """Sets the level of the audio and writes it to a file with a unique name."""
    request = run.request
    with run.progress.stage("write") as tick:
        samples = normalize(sound.samples, sound.sample_rate, request.normalization, tick=tick)
        name = f"musicgen-{request.model}-{request.seed}-{uuid.uuid4().hex[:8]}.{request.output_format}"
        write_audio(samples, sound.sample_rate, folder / name, sound.tags, tick=tick)
    return Result(folder / name, samples.shape[1] / sound.sample_rate, sound.steps, run.progress.seconds)


def stage_shares(request: Request) -> dict[str, float]:
    """Returns the stages in order, each with the relative time that it is expected to take."""
    decode = 60.0 if request.multi_band_diffusion else 8.0
    if request.mode is Mode.ENCODE_DECODE:
        return {"queue": 0, "load": 5, "condition": 40, "generate": 0, "decode": max(decode, 40), "write": 5}
    condition = 3.0 if request.mode is Mode.TEXT else 10.0
    return {"queue": 0, "load": 5, "condition": condition, "generate": 80, "decode": decode, "write": 2}
