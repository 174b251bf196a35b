"""How the next token of a request is drawn. Plain numbers, without torch."""

from dataclasses import dataclass

GREEDY_BELOW = 0.01
"""Below this temperature the most likely token is always taken: a draw has one outcome there, and logits
divided by such a number may leave the range of fp16."""


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn. The names are audiocraft's, but for `guidance` (its `cfg_coef`)."""

    top_k: int = 250
    """Draw among the k most likely tokens; 0: among all."""
    top_p: float = 0.0
    """Draw among the most likely tokens that hold this probability together; replaces `top_k` if > 0."""
    temperature: float = 1.0
    """Divides the logits; 0, and anything below `GREEDY_BELOW`: always the most likely token."""
    guidance: float = 3.0
    """Classifier-free guidance: unconditional + guidance * (conditional - unconditional)."""
