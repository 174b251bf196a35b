"""The one door to audiocraft 1.3.0: what it needs to import on today's stack, and why.

audiocraft was written against torch 2.1. Two of its imports name packages that have no build for
our torch, or that MusicGen's inference never calls:

- `xformers`: the attention module of a `memory_efficient` model, as every released one is, names three of
  its operations. With the default `torch` attention backend `unbind` is torch's, `LowerTriangularMask`
  is a mark that stands for `is_causal`, and `memory_efficient_attention` is looked for, never called.
- `spacy`: used by a whitespace tokenizer that no MusicGen checkpoint configures.

Every other module of the package takes audiocraft's names from here, so that the stand-ins are in
place first. They are put up only where the real package is absent.

Other imports only cost time, two thirds of what audiocraft takes to import. They are put off, and
nothing is lost: whoever comes to use one of them gets the real thing, imported then.

- `audiocraft`, `audiocraft.models`, `audiocraft.data` import every model, solver, metric and data set of
  audiocraft from their `__init__`. It runs when a name is asked for that none of their modules has.
- `transformers` (T5 and RoBERTa of conditioners that we do not build, EnCodec in transformers' format),
  `librosa` (filters that `chroma.py` has too), `num2words` (that whitespace tokenizer), `flashy` and `dora`
  (training) are named by modules that we need. A stand-in gives out names that find the real ones when
  they are used. It is in `sys.modules` only while audiocraft is imported: nobody else ever meets it.
"""

import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

STAND_INS = ("xformers", "spacy")
PUT_OFF = ("dora", "flashy", "flashy.distrib", "librosa", "num2words", "transformers")
PACKAGES = ("audiocraft", "audiocraft.data", "audiocraft.models")


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


class _Later:
    """A name of a module that is imported when the name is first used."""

    def __init__(self, module: str, name: str) -> None:
        self._found: Callable[[], Any] = lambda: getattr(importlib.import_module(module), name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._found(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._found()(*args, **kwargs)


class _PutOff(ModuleType):
    """Stands for a module that gives nothing but such names."""

    def __getattr__(self, name: str) -> _Later:
        if name.startswith("__"):
            raise AttributeError(name)  # what the import system asks every module for
        return _Later(self.__name__, name)


class _Package(ModuleType):
    """A package whose `__init__` runs when a name is asked for that is none of its modules'."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__version__":
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        inside = f"{self.__name__}.{name}"
        if importlib.util.find_spec(inside) is not None:
            return importlib.import_module(inside)
        assert self.__spec__ is not None and self.__spec__.loader is not None
        self.__class__ = ModuleType  # type: ignore[assignment]
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


@contextmanager
def _put_off() -> Iterator[None]:
    """Within, audiocraft is imported without its packages' `__init__` and without what is put off."""
    if "audiocraft" not in sys.modules:
        for name in PACKAGES:
            spec = importlib.util.find_spec(name)
            assert spec is not None
            sys.modules[name] = importlib.util.module_from_spec(spec)
            sys.modules[name].__class__ = _Package
    real = {name: sys.modules[name] for name in PUT_OFF if name in sys.modules}
    sys.modules |= {name: _PutOff(name) for name in PUT_OFF}
    try:
        yield
    finally:
        for name in PUT_OFF:
            del sys.modules[name]
        sys.modules |= real


_install()

with _put_off():
    from audiocraft.models import builders
    from audiocraft.models.encodec import (
        CompressionModel,
        EncodecModel,
        HFEncodecCompressionModel,
        InterleaveStereoCompressionModel,
    )
    from audiocraft.models.lm import LMModel
    from audiocraft.models.unet import DiffusionUnet
    from audiocraft.modules.chroma import ChromaExtractor
    from audiocraft.modules.codebooks_patterns import DelayedPatternProvider
    from audiocraft.modules.conditioners import ConditionFuser, ConditioningAttributes
    from audiocraft.modules.diffusion_schedule import NoiseSchedule, SampleProcessor

__all__ = [
    "STAND_INS",
    "ChromaExtractor",
    "CompressionModel",
    "ConditionFuser",
    "ConditioningAttributes",
    "DelayedPatternProvider",
    "DiffusionUnet",
    "EncodecModel",
    "HFEncodecCompressionModel",
    "InterleaveStereoCompressionModel",
    "LMModel",
    "NoiseSchedule",
    "SampleProcessor",
    "builders",
]
