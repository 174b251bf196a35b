"""One request's tokens: the conditions of each window, and the windows one after the other."""

from dataclasses import dataclass

import torch

from musicgen_svc import windows
from musicgen_svc.engine.sampling_params import SamplingParams
from musicgen_svc.loading.model import Model
from musicgen_svc.models.conditioners import Conditions, looped
from musicgen_svc.runtime.randomness import GlobalRandom
from musicgen_svc.runtime.ticks import Tick, no_tick


@dataclass(frozen=True)
class GenerationPlan:
    """Everything that generation needs to know. Nothing is drawn yet."""

    kept: torch.Tensor | None
    """[K, F] tokens that open the piece but lie too far back for the model to see."""
    prompt: torch.Tensor | None
    """[K, F] tokens that the first window continues."""
    windows: list[tuple[windows.Window, Conditions]]


def prepare(
    model: Model, *, prompt: str | None, frames: int, melody: torch.Tensor | None,
    clip_tokens: torch.Tensor | None, random: GlobalRandom, tick: Tick = no_tick,
) -> GenerationPlan:  # fmt: skip
    """Plans the windows and computes each one's conditions.

    Args:
        model: what generates.
        prompt: the text, if any.
        frames: how many new frames are wanted.
        melody: [1, T] at the model's rate, if the piece follows one.
        clip_tokens: [K, F], if the piece continues one.
        random: Demucs draws its time shift from it.
        tick: progress.
    """
    stride = windows.stride_frames(model.window, model.codec.frame_rate)
    kept, context = None, clip_tokens
    if clip_tokens is not None and clip_tokens.shape[1] >= model.window:
        seen = model.window - stride
        kept, context = clip_tokens[:, :-seen], clip_tokens[:, -seen:]
    known = 0 if context is None else context.shape[1]
    planned = list(windows.plan(known + frames, known, model.window, stride))

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
    return GenerationPlan(kept, context, conditioned)


def generate(
    model: Model,
    plan: GenerationPlan,
    sampling: SamplingParams,
    generator: torch.Generator,
    tick: Tick = no_tick,
) -> tuple[torch.Tensor, int]:
    """Generates the windows in turn: tokens [K, F] of the whole piece, and the engine's steps.

    `generator` goes on from window to window, as torch's global one does in audiocraft.
    """
    pieces = [] if plan.kept is None else [plan.kept]
    if plan.prompt is not None:
        pieces.append(plan.prompt)
    total = sum(window.length - window.prompt for window, _ in plan.windows)
    done = steps = 0
    tokens: torch.Tensor | None = plan.prompt
    previous: windows.Window | None = None
    for window, conditions in plan.windows:
        known = tokens if previous is None or tokens is None else tokens[:, window.start - previous.start :]
        assert (0 if known is None else known.shape[1]) == window.prompt
        fresh = window.length - window.prompt
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
        )
        pieces.append(tokens[:, window.prompt :])
        done, steps, previous = done + fresh, steps + counted, window
    return torch.cat(pieces, dim=1), steps
