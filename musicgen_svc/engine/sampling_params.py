"""How the tokens of a request are drawn, in plain numbers. This module does not import torch."""

from dataclasses import dataclass

GREEDY_BELOW = 0.01
"""Below this temperature the most likely token is taken. A draw would have the same outcome, but logits
divided by such a small number may leave the range of fp16."""


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of a request are drawn.

    The names and defaults are audiocraft's, except that its `cfg_coef` is `guidance` here.
    """

    top_k: int = 250
    """Draws among the k most likely tokens. 0 draws among all."""
    top_p: float = 0.0
    """Draws among the most likely tokens whose probabilities add up to this. Above 0 it replaces `top_k`."""
    temperature: float = 1.0
    """Divides the logits. Below `GREEDY_BELOW` the most likely token is taken."""
    guidance: float = 3.0
    """Classifier-free guidance: logits are unconditional + guidance * (conditional - unconditional)."""
