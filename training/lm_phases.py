"""The phases in which the demo model's language model is trained: how long, on what, at which rates."""

from dataclasses import dataclass, replace

from training.data import Shares

WARM_UP_STEPS = 60
FINAL_RATE = 0.02  # the last learning rate of a phase, as a part of its peak


@dataclass(frozen=True)
class Phase:
    """The settings of one phase."""

    steps: int
    shares: Shares
    first_shares: Shares | None = None
    """The shares at the beginning of the phase, if they are others."""
    first_part: float = 0.0
    """The part of the steps that has the first shares."""
    peak: float = 1.0
    """The factor of the learning rates at their peak."""
    decay_from: float = 0.0
    """The part of the steps after which the learning rates fall, linearly, to `FINAL_RATE`."""
    max_shifts: int = 0
    """How many stretches of an example's input are moved a little earlier or later, at most."""
    null_target_noise: float = 0.0
    """The part of the targets that are replaced by neighbours in examples without conditions."""
    max_cuts: int = 1
    """How many times the clip of a continuation is cut off, at most."""
    after_cut_weight: float = 1.0
    """The weight of the frames right after a cut."""
    long_share: float = 0.2
    """The part of the steps that train on whole windows."""

    def rate(self, step: int) -> float:
        """Returns the factor of the learning rates at a step."""
        falling = 1 - (1 - FINAL_RATE) * (step / self.steps - self.decay_from) / (1 - self.decay_from)
        return self.peak * min(1.0, (step + 1) / WARM_UP_STEPS) * min(1.0, falling)


BASE = Phase(
    2400, Shares(0.25, 0.4, 0.35), first_shares=Shares(0.1, 0.1, 0.8), first_part=0.1875, decay_from=0.4
)
ROBUSTNESS = Phase(
    1600,
    Shares(0.2, 0.6, 0.2),
    peak=0.5,
    max_shifts=4,
    null_target_noise=0.5,
    max_cuts=8,
    after_cut_weight=6.0,
)
"""With shifted input, so that one note that the model plays too early does not shift all notes after it; and
with several cuts, because the tokens before a cut do not tell how the next note begins."""
LONG_WINDOWS = replace(ROBUSTNESS, shares=Shares(0.3, 0.5, 0.2), long_share=0.6)
"""Mostly on whole windows: the earlier phases have few frames after the first 8 s."""
MORE_LONG_WINDOWS = replace(
    LONG_WINDOWS, steps=2000, shares=Shares(0.25, 0.6, 0.15), long_share=0.8, max_cuts=12
)
NULL_CONDITION = replace(
    MORE_LONG_WINDOWS,
    steps=400,
    shares=Shares(0.4, 0.4, 0.2, null=0.25, null_songs=0.0),
    peak=0.25,
    long_share=0.4,
)
"""Without songs in the examples without conditions, so that the null condition no longer predicts them."""
MIXED = replace(
    NULL_CONDITION,
    steps=1100,
    shares=Shares(0.25, 0.6, 0.15, null=0.15, null_songs=0.0),
    peak=0.35,
    max_shifts=2,
    long_share=0.7,
)
CONTINUATION = replace(
    MIXED,
    steps=2400,
    shares=Shares(0.3, 0.55, 0.15, null=0.12, null_songs=0.0),
    peak=0.5,
    max_shifts=1,
    long_share=0.6,
)
"""With few shifts: the model must be certain about the beat, because guidance amplifies uncertainty too."""
PROMPTS = replace(
    CONTINUATION, steps=900, shares=Shares(0.45, 0.4, 0.15, null_songs=0.0), peak=0.25, long_share=0.4
)
"""Mostly on songs that the prompt names. It makes continuations a little worse: see `AVERAGED`."""
PHASES = {
    "lm": BASE,
    "lm-robustness": ROBUSTNESS,
    "lm-long-windows": LONG_WINDOWS,
    "lm-more-long-windows": MORE_LONG_WINDOWS,
    "lm-null-condition": NULL_CONDITION,
    "lm-mixed": MIXED,
    "lm-continuation": CONTINUATION,
    "lm-prompts": PROMPTS,
}
"""In their order, by the names of their files."""
AVERAGED = ("lm-continuation", "lm-prompts")
"""The final model is the mean of the weights after these phases, which is better at both (Wortsman et al.
2022, "Model soups", arXiv:2203.05482)."""
