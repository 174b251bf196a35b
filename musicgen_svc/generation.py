"""Generates the tokens of one request: plans its windows with their conditions, and decodes each."""

from dataclasses import dataclass

import torch

from musicgen_svc import windows
from musicgen_svc.engine.engine import OnFrames
from musicgen_svc.engine.sampling_params import SamplingParams
from musicgen_svc.loading.model import Model
from musicgen_svc.models.conditioners import Conditions, looped
from musicgen_svc.runtime.randomness import GlobalRandom
from musicgen_svc.runtime.ticks import Tick, no_tick


@dataclass(frozen=True)
class GenerationPlan:
    """The input of `generate`: the windows with their conditions, and the tokens of a clip.

    Known tokens are given and not generated. A prompt is a text, except in the engine: it knows no text, and
    calls the known tokens of a window its prompt, as audiocraft does.
    """

    kept: torch.Tensor | None
    """[K, F] tokens of the piece's beginning, before the first window; None: there are none."""
    known: torch.Tensor | None
    """[K, F] tokens that the first window continues; None: it starts from nothing."""
    windows: list[tuple[windows.Window, Conditions]]


def prepare(
    model: Model, *, prompt: str | None, frames: int, melody: torch.Tensor | None,
    clip_tokens: torch.Tensor | None, random: GlobalRandom, tick: Tick = no_tick,
) -> GenerationPlan:  # fmt: skip
    """Plans the windows and computes the conditions of each.

    Args:
        model: the model that will generate.
        prompt: the text, or None.
        frames: how many new frames are wanted.
        melody: [1, T] at the codec's sample rate, a melody to follow, or None. A melody that is shorter than
            the piece is repeated.
        clip_tokens: [K, F], a clip to continue, or None.
        random: Demucs draws its time shift from this.
        tick: called with the progress of the conditioning.

    Raises:
        InputError: the prompt has too many tokens.
    """
    stride = windows.stride_frames(model.window, model.codec.frame_rate)
    kept, known = None, clip_tokens
    if clip_tokens is not None and clip_tokens.shape[1] >= model.window:
        seen = model.window - stride
        kept, known = clip_tokens[:, :-seen], clip_tokens[:, -seen:]
    known_frames = 0 if known is None else known.shape[1]
    planned = list(windows.plan(known_frames + frames, known_frames, model.window, stride))

    text = model.conditioner.text(prompt, lambda *_: tick(0, 1))
    conditioned: list[tuple[windows.Window, Conditions]] = []
    for index, window in enumerate(planned):
        part = melody
        if melody is not None and len(planned) > 1:
            start, length = window.start * model.codec.hop, int(model.window_s * model.codec.sample_rate)
            part = looped(melody, start, length)

        def tick_window(done: int, total: int, index: int = index) -> None:
            tick(index * total + done, len(planned) * total)

        if melody is None and conditioned:
            conditions = conditioned[0][1]  # the null melody is the same in every window
        else:
            with random.pinned():
                conditions = text | model.conditioner.melody(part, tick_window)
        conditioned.append((window, conditions))
    return GenerationPlan(kept, known, conditioned)


def generate(
    model: Model,
    plan: GenerationPlan,
    sampling: SamplingParams,
    generator: torch.Generator,
    tick: Tick = no_tick,
    on_frames: OnFrames | None = None,
) -> tuple[torch.Tensor, int]:
    """Generates one window after the other.

    Args:
        model: the model that `prepare` was given.
        plan: what `prepare` returned.
        sampling: how tokens are drawn.
        generator: continues from window to window, as torch's global generator does in audiocraft.
        tick: called with the progress, in steps of the engine weighted by the frames of each window.
        on_frames: called with the frames of the whole piece in order and each once: the known ones first, and
            the others as soon as they are final. The device is not held meanwhile.

    Returns:
        The tokens of the whole piece, [K, F], known ones included, and the number of steps.
    """
    parts = [tokens for tokens in (plan.kept, plan.known) if tokens is not None]
    if on_frames is not None:
        for part in parts:
            if part.shape[1]:
                on_frames(part)
    total = sum(window.length - window.known for window, _ in plan.windows)
    done = steps = 0
    tokens: torch.Tensor | None = plan.known
    previous: windows.Window | None = None
    for window, conditions in plan.windows:
        known = tokens if previous is None or tokens is None else tokens[:, window.start - previous.start :]
        assert (0 if known is None else known.shape[1]) == window.known
        fresh = window.length - window.known
        counted = 0

        def tick_window(step: int, of: int, fresh: int = fresh, done: int = done) -> None:
            nonlocal counted
            counted = step
            tick(done * of + fresh * step, total * of)

        tokens = model.engine.generate(
            conditions,
            prompt=known,
            length=window.length,
            sampling=sampling,
            generator=generator,
            tick=tick_window,
            on_frames=on_frames,
        )
        parts.append(tokens[:, window.known :])
        done, steps, previous = done + fresh, steps + counted, window
    return torch.cat(parts, dim=1), steps
