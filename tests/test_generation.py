"""The frames that `generate` reports are those of the whole piece, for any windows and known tokens."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from musicgen_svc import windows
from musicgen_svc.engine.sampling_params import SamplingParams
from musicgen_svc.generation import GenerationPlan, generate
from musicgen_svc.runtime.ticks import no_tick


class NumberingEngine:
    """An engine whose tokens are numbers that count up, so that a frame lost or repeated shows."""

    def __init__(self) -> None:
        self.next = 1000

    def generate(self, _: Any, *, prompt: Tensor | None, length: int, on_frames: Any, **__: Any) -> Tensor:
        known = torch.zeros(4, 0, dtype=torch.int64) if prompt is None else prompt
        new = torch.arange(self.next, self.next + length - known.shape[1]).repeat(4, 1)
        self.next += new.shape[1]
        for part in new.split(7, 1) if on_frames else ():  # type: ignore[no-untyped-call]
            on_frames(part)
        return torch.cat([known, new], 1)


@pytest.mark.parametrize(
    ("kept", "known", "frames"),
    [
        (None, None, 20),
        (None, None, 100),
        (None, 30, 40),
        (None, 30, 5),
        (100, 20, 13),
        (100, 20, 130),
        (0, 20, 9),
    ],
)
def test_the_reported_frames_joined_are_the_whole_piece(
    kept: int | None, known: int | None, frames: int
) -> None:
    known_frames = known or 0
    plan = GenerationPlan(
        None if kept is None else torch.arange(kept).repeat(4, 1),
        None if known is None else torch.arange(500, 500 + known).repeat(4, 1),
        [(window, {}) for window in windows.plan(known_frames + frames, known_frames, 50, 30)],
    )
    model: Any = SimpleNamespace(engine=NumberingEngine())
    seen: list[Tensor] = []
    tokens, _ = generate(model, plan, SamplingParams(), torch.Generator(), no_tick, seen.append)
    assert tokens.shape == (4, (kept or 0) + known_frames + frames)
    assert torch.equal(torch.cat(seen, 1), tokens)
    assert all(part.shape[1] for part in seen)

    model = SimpleNamespace(engine=NumberingEngine())
    assert torch.equal(generate(model, plan, SamplingParams(), torch.Generator())[0], tokens)
