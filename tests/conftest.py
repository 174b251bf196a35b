"""The tiny checkpoints, and audiocraft's own models over them, for every test."""

import contextlib
import fcntl
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent

# Servers and commands start some forty Pythons, and uv installs no bytecode: half of a start with torch
# is compiling. Each module is compiled once, even where the machine's settings say that none is kept.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ["PYTHONPYCACHEPREFIX"] = str(ROOT / ".cache" / "bytecode")
sys.dont_write_bytecode, sys.pycache_prefix = False, os.environ["PYTHONPYCACHEPREFIX"]

# A shell's background jobs ignore Ctrl-C, and so would the commands that are tested with it.
signal.signal(signal.SIGINT, signal.default_int_handler)

from tests.fixtures import tiny_weights  # noqa: E402

# audiocraft loads T5, Demucs and transformers' EnCodec by name. The Hugging Face libraries read these
# when they are imported, so that no test can reach the network or a cache of the machine's user.
HUB = tiny_weights.home(ROOT).with_name(tiny_weights.home(ROOT).name + "-hub")
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(HUB), "HF_HUB_CACHE": str(HUB)}

torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Kernels are checked in a selection of cases, because all of them take half an hour."""
    parser.addoption("--all-kernels", action="store_true", help="check the kernels of a step in every case")


@pytest.fixture(scope="session")
def all_kernels(pytestconfig: pytest.Config) -> bool:
    """Whether kernels are checked in every case."""
    return bool(pytestconfig.getoption("all_kernels"))


def pytest_configure(config: pytest.Config) -> None:
    """torch's check for waits, which tests on a GPU switch on, warns that it may miss some."""
    config.addinivalue_line("filterwarnings", "ignore:Synchronization debug mode is a prototype")


@pytest.fixture(scope="session")
def weights() -> Iterator[Path]:
    """The tiny checkpoints, laid out as `weights/`. Several test processes may ask at once."""
    folder = tiny_weights.ensure(ROOT)
    with HUB.with_name(f"{HUB.name}.lock").open("w") as lock:
        with contextlib.suppress(BlockingIOError):  # another process has laid it out, and reads it
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            tiny_weights.hub_cache(folder, HUB)
        fcntl.flock(lock, fcntl.LOCK_SH)  # to the end: nobody writes into it while it is read
        yield folder


@pytest.fixture
def all_weights_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes loaded models keep the weights of their layers and heads after an engine has packed them."""
    from musicgen_svc.models.language_model import LazyLM

    @contextlib.contextmanager
    def loaded(lazy: LazyLM, part: torch.nn.Module) -> Iterator[None]:
        lazy.load(part)
        yield

    monkeypatch.setattr(LazyLM, "loaded", loaded)


@pytest.fixture(scope="session")
def pretrained(weights: Path) -> Callable[[str], Any]:
    """`pretrained("melody")`: audiocraft's own `MusicGen` of that folder, made once and shared."""
    import musicgen_svc.audiocraft_compat  # noqa: F401

    models: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in models:
            from audiocraft.models.musicgen import MusicGen

            with warnings.catch_warnings():  # audiocraft uses torch's older weight norm
                warnings.filterwarnings("ignore", "`torch.nn.utils.weight_norm` is deprecated", FutureWarning)
                models[name] = MusicGen.get_pretrained(str(weights / name), device="cpu")
        return models[name]

    return get
