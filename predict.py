"""The service as Cog runs it: fifteen inputs, and no logic.

`cog build` reads the text of this file and does not run it. Every default, bound and description must be one
plain literal, because Cog drops anything else without a message.
"""
# ruff: noqa: B008, E501 (an Input is a call in the signature, a description one literal on one line)

import os
from collections.abc import Callable

from cog import BaseRunner, Input, Path, concurrent, current_scope


class Predictor(BaseRunner):
    """Passes set-up and requests on to `Service`."""

    def setup(self, weights: str | None = None) -> None:
        """Loads the `finetuned` model. `weights`: the value of COG_WEIGHTS, a checkpoint's path or URL."""
        # Imported here, because torch and audiocraft take seconds to import, and their errors belong to set-up.
        from musicgen_svc.service import Service
        from musicgen_svc.settings import Settings

        self.service = Service(Settings.from_environment(os.environ))
        self.service.start(weights)

    async def healthcheck(self) -> bool:  # async, so that Cog runs it on the event loop, without a thread
        """Whether the service can run predictions."""
        return self.service.healthy()

    @concurrent(max=4)  # as in cog.yaml, which `cog push` does not read; COG_MAX_CONCURRENCY overrides it
    async def run(
        self,
        model_version: str = Input(
            default="finetuned",
            choices=["melody", "small", "medium", "large", "encode-decode", "finetuned"],
            description="The model that generates. 'encode-decode' generates nothing: it sends `input_audio` through the audio codec and back.",
        ),
        prompt: str | None = Input(
            default=None,
            description="The music in words, up to 2,000 characters: genre, instruments, mood, tempo. May be left out when there is `input_audio`.",
        ),
        input_audio: Path | None = Input(
            default=None,
            description="A sound file of up to 100 MB and 15 minutes. With `continuation` the music goes on from it; without, the music follows its melody.",
        ),
        duration: int = Input(
            default=8,
            ge=1,
            le=600,
            description="Seconds of music to generate. With `continuation` they come after the selected part of `input_audio`.",
        ),
        continuation: bool = Input(
            default=False,
            description="Whether to continue `input_audio` (true) or to follow its melody (false).",
        ),
        continuation_start: int = Input(
            default=0,
            ge=0,
            description="Where the part of `input_audio` that is used begins, in seconds.",
        ),
        continuation_end: int | None = Input(
            default=None,
            ge=-1,
            description="Where the part of `input_audio` that is used ends, in seconds. Left out or -1: the end of the file.",
        ),
        multi_band_diffusion: bool = Input(
            default=False,
            description="Whether MultiBand Diffusion turns tokens into sound instead of EnCodec's decoder: fewer artefacts, much slower.",
        ),
        normalization_strategy: str = Input(
            default="loudness",
            choices=["loudness", "clip", "peak", "rms"],
            description="How the level is set: to a loudness of -14 LUFS, by clipping only, to a peak of -1 dBFS, or to an RMS of -18 dBFS.",
        ),
        top_k: int = Input(
            default=250,
            ge=0,
            description="Each token is drawn from the k most likely ones. 0: from all.",
        ),
        top_p: float = Input(
            default=0.0,
            ge=0,
            le=1,
            description="Above 0, each token is drawn from the most likely ones that hold this much probability together, and `top_k` is not used.",
        ),
        temperature: float = Input(
            default=1.0,
            ge=0,
            le=10,
            description="Higher is more surprising, lower more predictable. 0 always takes the most likely token.",
        ),
        classifier_free_guidance: int = Input(
            default=3,
            ge=0,
            le=20,
            description="How closely the music keeps to the prompt and the melody. Higher is closer and less varied.",
        ),
        output_format: str = Input(
            default="wav",
            choices=["wav", "mp3"],
            description="Format of the file that comes back: 16-bit wav, or mp3 at 320 kbit/s.",
        ),
        seed: int | None = Input(
            default=None,
            ge=-1,
            le=4294967295,
            description="The same seed and inputs give the same music; 0 is a seed too. Left out or -1: a random one, which is reported.",
        ),
    ) -> Path:
        """Runs one request. `musicgen_svc/service.py` has its contract and errors."""
        fields = {
            "model_version": model_version,
            "prompt": prompt,
            "input_audio": input_audio,
            "duration": duration,
            "continuation": continuation,
            "continuation_start": continuation_start,
            "continuation_end": continuation_end,
            "multi_band_diffusion": multi_band_diffusion,
            "normalization_strategy": normalization_strategy,
            "top_k": top_k,
            "top_p": top_p,
            "temperature": temperature,
            "classifier_free_guidance": classifier_free_guidance,
            "output_format": output_format,
            "seed": seed,
        }
        send_chunk = self._chunk_sender()
        return Path(await self.service.predict(fields, self.record_metric, self._given_up, send_chunk))

    def _given_up(self) -> bool:
        """Whether Cog has ended the present prediction: until then it refuses a metric of a reserved name."""
        try:
            self.record_metric("predict_time", 0.0)
        except ValueError:
            return False
        return True

    def _chunk_sender(self) -> Callable[[dict[str, object]], None] | None:
        """Returns what sends a chunk of live audio, as a metric; None if `context` asks for none."""
        scope = current_scope()  # the request's own, which another thread would not find

        def send(chunk: dict[str, object]) -> None:
            scope.record_metric("audio", chunk)
            scope.metrics.delete("audio")  # or it would stay in the reply, and in all that a webhook gets

        return send if scope.context.get("live") == "1" else None
