"""Importing this module imports audiocraft 1.3.0, with stand-ins in `sys.modules` for packages that it lacks.

It is the only module of the package that has an effect when it is imported, and the only one that imports
audiocraft. All others take audiocraft's names from here, so that the stand-ins are installed first.

audiocraft was written for torch 2.1. Two of the packages that it imports have no build for the torch of the
service, or are never called by MusicGen's inference. They get a stand-in if they are not installed:

- `xformers`: the attention of a `memory_efficient` model, as every released one is, uses three of its names.
  With the default attention backend `torch`, `unbind` is torch's, `LowerTriangularMask` only marks the
  attention as causal, and `memory_efficient_attention` is looked up but never called.
- `spacy`: a whitespace tokenizer uses it that no MusicGen checkpoint configures.

Other packages only cost time, two thirds of audiocraft's import. Their import is delayed until they are used:

- `audiocraft`, `audiocraft.models` and `audiocraft.data` import every model, solver, metric and data set of
  audiocraft in their `__init__`. It runs when a name is needed that is not one of their modules.
- Modules that the service needs import `transformers` (for conditioners and a codec that the service builds
  itself), `librosa` (for filters that `models/chroma.py` has too), `num2words` (for the whitespace
  tokenizer), `flashy` and `dora` (for training). While audiocraft is imported, `sys.modules` has a stand-in
  for each, whose names import the real package when they are used. Then the stand-ins are removed again.
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
DELAYED = ("dora", "flashy", "flashy.distrib", "librosa", "num2words", "transformers")
PACKAGES = ("audiocraft", "audiocraft.data", "audiocraft.models")


class _LowerTriangularMask:
    """Marks an attention as causal: audiocraft's `torch` backend only asks whether there is a mask."""


def _memory_efficient_attention(*_: object, **__: object) -> None:
    """Raises an error. audiocraft looks up this function when it builds a model, and never calls it."""
    raise RuntimeError("xformers' attention was asked for; the service uses torch's")


def _stand_in(name: str) -> ModuleType:
    """Returns an empty module with this name."""
    module = ModuleType(name, doc=f"Stand-in for {name}, see {__name__}")
    module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None)
    return module


def _install() -> None:
    """Puts stand-ins into `sys.modules` for those packages that are not installed."""
    if importlib.util.find_spec("xformers") is None:
        xformers, ops = _stand_in("xformers"), _stand_in("xformers.ops")
        xformers.ops = ops  # type: ignore[attr-defined]
        ops.unbind = torch.unbind  # type: ignore[attr-defined]
        ops.LowerTriangularMask = _LowerTriangularMask  # type: ignore[attr-defined]
        ops.memory_efficient_attention = _memory_efficient_attention  # type: ignore[attr-defined]
        sys.modules |= {"xformers": xformers, "xformers.ops": ops}
    if importlib.util.find_spec("spacy") is None:
        sys.modules["spacy"] = _stand_in("spacy")


class _DelayedName:
    """A name of a module that is imported when an attribute of the name is read or the name is called."""

    def __init__(self, module: str, name: str) -> None:
        self._find: Callable[[], Any] = lambda: getattr(importlib.import_module(module), name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._find(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._find()(*args, **kwargs)


class _DelayedModule(ModuleType):
    """A stand-in for a module, whose attributes are `_DelayedName`s."""

    def __getattr__(self, name: str) -> _DelayedName:
        if name.startswith("__"):
            raise AttributeError(name)  # the import system asks every module for such names
        return _DelayedName(self.__name__, name)


class _DelayedPackage(ModuleType):
    """A package whose `__init__` runs when a name is read that is not one of its modules."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__version__":
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        module = f"{self.__name__}.{name}"
        if importlib.util.find_spec(module) is not None:
            return importlib.import_module(module)
        assert self.__spec__ is not None and self.__spec__.loader is not None
        self.__class__ = ModuleType  # type: ignore[assignment]
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


@contextmanager
def _delayed_imports() -> Iterator[None]:
    """Context manager in which importing audiocraft runs no `__init__` and imports none of `DELAYED`."""
    if "audiocraft" not in sys.modules:
        for name in PACKAGES:
            spec = importlib.util.find_spec(name)
            assert spec is not None
            sys.modules[name] = importlib.util.module_from_spec(spec)
            sys.modules[name].__class__ = _DelayedPackage
    real = {name: sys.modules[name] for name in DELAYED if name in sys.modules}
    sys.modules |= {name: _DelayedModule(name) for name in DELAYED}
    try:
        yield
    finally:
        for name in DELAYED:
            del sys.modules[name]
        sys.modules |= real


_install()

with _delayed_imports():
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
