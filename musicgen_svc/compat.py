"""The one door to audiocraft 1.3.0: what it needs to import on today's stack, and why.

audiocraft was written against torch 2.1. Two of its imports name packages that have no build for
our torch, or that MusicGen's inference never calls:

- `xformers`: the attention module of a `memory_efficient` model, as every released one is, names three of
  its operations. With the default `torch` attention backend `unbind` is torch's, `LowerTriangularMask`
  is a mark that stands for `is_causal`, and `memory_efficient_attention` is looked for, never called.
- `spacy`: used by a whitespace tokenizer that no MusicGen checkpoint configures.

Every other module of the package takes audiocraft's names from here, so that the stand-ins are in
place first. They are put up only where the real package is absent.
"""

import importlib.machinery
import importlib.util
import sys
from types import ModuleType

import torch

STAND_INS = ("xformers", "spacy")


class _LowerTriangularMask:
    """A mark: audiocraft's `torch` attention backend only asks whether there is a mask."""


def _memory_efficient_attention(*_: object, **__: object) -> None:
    """Looked for when a model is made, never called."""
    raise RuntimeError("xformers' attention was asked for; the service uses torch's")


def _stand_in(name: str) -> ModuleType:
    module = ModuleType(name, doc=f"Stand-in for {name}, see {__name__}")
    module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None)
    return module


def _install() -> None:
    """Puts the stand-ins into `sys.modules`, where the real packages are not installed."""
    if importlib.util.find_spec("xformers") is None:
        xformers, ops = _stand_in("xformers"), _stand_in("xformers.ops")
        xformers.ops = ops  # type: ignore[attr-defined]
        ops.unbind = torch.unbind  # type: ignore[attr-defined]
        ops.LowerTriangularMask = _LowerTriangularMask  # type: ignore[attr-defined]
        ops.memory_efficient_attention = _memory_efficient_attention  # type: ignore[attr-defined]
        sys.modules |= {"xformers": xformers, "xformers.ops": ops}
    if importlib.util.find_spec("spacy") is None:
        sys.modules["spacy"] = _stand_in("spacy")


_install()

from audiocraft.models import builders  # noqa: E402
from audiocraft.models.encodec import (  # noqa: E402
    CompressionModel,
    EncodecModel,
    HFEncodecCompressionModel,
    InterleaveStereoCompressionModel,
)
from audiocraft.models.lm import LMModel  # noqa: E402
from audiocraft.modules.chroma import ChromaExtractor  # noqa: E402
from audiocraft.modules.codebooks_patterns import DelayedPatternProvider  # noqa: E402
from audiocraft.modules.conditioners import ConditionFuser, ConditioningAttributes  # noqa: E402
from audiocraft.modules.diffusion_schedule import NoiseSchedule, SampleProcessor  # noqa: E402

__all__ = [
    "STAND_INS",
    "ChromaExtractor",
    "CompressionModel",
    "ConditionFuser",
    "ConditioningAttributes",
    "DelayedPatternProvider",
    "EncodecModel",
    "HFEncodecCompressionModel",
    "InterleaveStereoCompressionModel",
    "LMModel",
    "NoiseSchedule",
    "SampleProcessor",
    "builders",
]
