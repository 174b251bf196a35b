"""What `scripts/gpu_check` needs on a machine that has its own PyTorch: the only list of it.

    python3 -m benchmarks.packages      prints the packages to bring, in the versions of requirements.lock

This module imports nothing that must be installed, because it runs before anything is.
"""

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

GIVEN = (
    "torch", "torchaudio", "triton", "transformers", "sentencepiece", "einops", "safetensors", "PyYAML",
    "numpy", "scipy", "scikit-learn", "numba", "joblib", "lazy-loader", "msgpack", "matplotlib",
    "h11", "prometheus_client", "requests", "tqdm", "pytest", "pytest-timeout", "hypothesis",
)  # fmt: skip
"""Distributions that the machine must have, with what they need themselves, in its own versions. Only torch
and torchaudio must have those of requirements.lock."""
BROUGHT = (
    "antlr4-python3-runtime", "audiocraft", "audioread", "av", "cffi", "cog", "coglet", "decorator", "demucs",
    "imageio-ffmpeg", "julius", "lameenc", "librosa", "mutagen", "omegaconf", "platformdirs", "pooch",
    "pycparser", "pydub", "pyloudnorm", "soundfile", "soxr", "structlog",
)  # fmt: skip
"""Distributions that are installed beside them, in the versions of requirements.lock, without their own
dependencies."""
LOCK = Path(__file__).resolve().parents[1] / "requirements.lock"


def requirements(names: Iterable[str] = BROUGHT) -> list[str]:
    """Returns the requirement of each distribution, as "name==version", from requirements.lock.

    Raises:
        KeyError: requirements.lock does not have the distribution.
    """
    lines = (line.split() for line in LOCK.read_text().splitlines() if "==" in line)
    locked = {words[0].partition("==")[0]: words[0] for words in lines}
    return [locked[name.lower().replace("_", "-")] for name in names]


def missing() -> list[str]:
    """Lists the distributions that this Python does not have."""
    return [name for name in (*GIVEN, *BROUGHT) if not _is_installed(name)]


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    print("\n".join(requirements()))
