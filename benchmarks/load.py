"""Loading a full-size `small`: ours and audiocraft's `get_pretrained`, from the same files, in turn.

    scripts/bench_load --json result.json

The files have the released ones' formats, names and sizes, and random numbers: a language model in fp16 and
in fp32, its codec, and T5. Each load is a process of its own. It first loads tiny models in the same way, so
that imports, which both have and which are not what is compared, are over; then it loads the real ones, from
files that were just read, while this process watches its anonymous memory: what no file backs, and what
therefore nobody can take back. `touched_s` adds the time in which every weight is read once, and in which
what goes on in the background has ended: what is put off costs that much of the first request.
"""

import argparse
import contextlib
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
SIDES = ("audiocraft", "ours")
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
T5_BASE = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "vocab_size": 32_128}
POLL_S = 0.002
GB = 1e9


@dataclass(frozen=True)
class Load:
    """One load in one process."""

    seconds: float
    touched_s: float
    weights_gb: float
    """Of all modules, in their final types."""
    peak_gb: float
    """What anonymous memory grew by, at most."""
    final_gb: float


@dataclass
class Row:
    """One kind of file. The lists have one entry per pair of loads."""

    files: str
    audiocraft: list[Load] = field(default_factory=list)
    ours: list[Load] = field(default_factory=list)

    def ratio(self, what: str = "seconds") -> list[float]:
        """audiocraft's over ours."""
        pairs = zip(self.audiocraft, self.ours, strict=True)
        return [getattr(theirs, what) / getattr(own, what) for theirs, own in pairs]


def main() -> int:
    args = arguments()
    if args.child:
        side, weights, name = args.child
        load_once(side, Path(weights), name)
        return 0
    from benchmarks.decode import machine

    rows = [Row(files) for files in DTYPES]
    with workplace(args.folder) as weights:
        for _ in range(args.pairs):
            for row in rows:
                read_all(weights / row.files, weights / "t5-base")
                for side in SIDES:
                    getattr(row, side).append(measured(side, weights, row.files))
    result = {
        "model": "small",
        **machine(torch.device("cpu")),
        "rows": [
            asdict(row) | {"ratio": row.ratio(), "ratio_touched": row.ratio("touched_s")} for row in rows
        ],
    }
    show(result, rows)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3, help="of loads, audiocraft's and ours (default: 3)")
    parser.add_argument("--folder", type=Path, help="keep the 4 GB of files here, and use them the next time")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


# --- the files -----------------------------------------------------------------------------------


@contextlib.contextmanager
def workplace(folder: Path | None) -> Iterator[Path]:
    """A folder of weights: both language models, T5, and the tiny ones that a process warms up with."""
    if folder is not None:
        build(folder)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="musicgen-bench-") as temporary:
        build(Path(temporary))
        yield Path(temporary)


def build(folder: Path) -> None:
    from tests.fixtures import tiny_weights

    if (folder / "complete").is_file():
        return
    print(f"Writing 4 GB of random weights into {folder} ...")
    tiny = tiny_weights.ensure(ROOT)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("small", "t5-small"):
        shutil.copytree(tiny / name, folder / name, dirs_exist_ok=True)
    save_t5(folder / "t5-base")
    lm, codec = lm_package(), codec_package()
    for files, dtype in DTYPES.items():
        (folder / files).mkdir(exist_ok=True)
        state = {name: tensor.to(dtype) for name, tensor in lm["best_state"].items()}
        torch.save(lm | {"best_state": state}, folder / files / "state_dict.bin")
        torch.save(codec, folder / files / "compression_state_dict.bin")
    (folder / "complete").touch()


def lm_package() -> dict[str, Any]:
    """audiocraft's export of `small`."""
    from benchmarks.random_models import SIZES, language_model
    from tests.fixtures import tiny_codecs, tiny_models

    size = SIZES["small"]
    state = language_model(**size).state_dict()
    projection = torch.nn.Linear(T5_BASE["d_model"], size["dim"]).state_dict()
    prefix = "condition_provider.conditioners.description.output_proj."
    state |= {prefix + name: tensor for name, tensor in projection.items()}
    config = tiny_models.lm_config("small")
    config["transformer_lm"] |= {
        "dim": size["dim"], "num_layers": size["layers"], "num_heads": size["heads"], "card": 2048,
    }  # fmt: skip
    config["conditioners"]["description"]["t5"]["name"] = "t5-base"
    return tiny_codecs.package(state, config)


def codec_package() -> dict[str, Any]:
    """audiocraft's export of EnCodec at 32 kHz."""
    from omegaconf import OmegaConf

    from musicgen_svc.audiocraft_compat import builders
    from tests.fixtures import tiny_codecs

    config = tiny_codecs.codec_config()
    config["seanet"] |= {"dimension": 128, "n_filters": 64}
    config["rvq"]["bins"] = 2048
    with warnings.catch_warnings():  # the checkpoints' spelling of weight norm, which torch deprecates
        warnings.simplefilter("ignore", FutureWarning)
        model = builders.get_compression_model(OmegaConf.create(config | {"device": "cpu"}))
    return tiny_codecs.package(model.state_dict(), config)


def save_t5(folder: Path) -> None:
    """With its decoder, as the released file has one, and a tokenizer of the real size."""
    from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer

    model = T5ForConditionalGeneration(T5Config(**T5_BASE, decoder_start_token_id=0))
    model.save_pretrained(folder)
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    T5Tokenizer(vocab=words + [(f"▁w{i}", -10.0) for i in range(32_000 - 4)]).save_pretrained(folder)


def read_all(*folders: Path) -> None:
    """Brings the files into the page cache, where both sides then find them."""
    for folder in folders:
        for path in folder.iterdir():
            with path.open("rb", buffering=0) as file:
                while file.read(1 << 24):
                    pass


# --- one load ------------------------------------------------------------------------------------


def measured(side: str, weights: Path, name: str) -> Load:
    """Loads in a process of its own, and watches it."""
    command = [sys.executable, "-m", "benchmarks.load", "--child", side, os.fspath(weights), name]
    # In the folder of the weights, where audiocraft finds T5 by its name.
    with subprocess.Popen(
        command, cwd=weights, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"},
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n", f"{side} did not load the tiny model"
            before = peak = anonymous(process.pid)
            print(file=process.stdin, flush=True)
            os.set_blocking(process.stdout.fileno(), False)
            while not (line := process.stdout.readline()):
                assert process.poll() is None, f"{side} did not load {name}"
                peak = max(peak, anonymous(process.pid))
                time.sleep(POLL_S)
            final = anonymous(process.pid)
            os.set_blocking(process.stdout.fileno(), True)
            print(file=process.stdin, flush=True)
            touched = json.loads(process.stdout.readline())
        finally:
            process.stdin.close()
    seconds = json.loads(line)["seconds"]
    return Load(
        seconds=seconds,
        touched_s=seconds + touched["seconds"],
        weights_gb=touched["bytes"] / GB,
        peak_gb=(max(peak, final) - before) / GB,
        final_gb=(final - before) / GB,
    )


def anonymous(pid: int) -> int:
    """Bytes of a process's resident memory that no file backs."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def load_once(side: str, weights: Path, name: str) -> None:
    """In the process that is watched. It waits for a line before each of its two answers."""
    load = {"audiocraft": load_audiocrafts, "ours": load_ours}[side]
    load(weights, "small")
    gc.collect()
    print("ready", flush=True)
    sys.stdin.readline()
    loaded, seconds = timed(lambda: load(weights, name))
    print(json.dumps({"seconds": seconds}), flush=True)
    sys.stdin.readline()
    tensors = weights_of_all_modules()
    _, seconds = timed(lambda: ([tensor.sum() for tensor in tensors], finished(loaded)))
    print(json.dumps({"seconds": seconds, "bytes": sum(tensor.nbytes for tensor in tensors)}), flush=True)


def load_audiocrafts(weights: Path, name: str) -> Any:
    import musicgen_svc.audiocraft_compat  # noqa: F401, I001  what audiocraft needs to import here
    from audiocraft.models.musicgen import MusicGen

    return MusicGen.get_pretrained(os.fspath(weights / name), device="cpu")


def load_ours(weights: Path, name: str) -> Any:
    from musicgen_svc.loading.loader import Loader
    from musicgen_svc.settings import Settings
    from musicgen_svc.weights.catalog import read_catalog
    from musicgen_svc.weights.paths import Weights

    loader = Loader(
        Weights.at(weights, read_catalog(), os.fspath(weights / name)), torch.device("cpu"), Settings()
    )
    return loader, loader.start()


def finished(loaded: Any) -> None:
    """Ours goes on in the background: the hash of the file, which the first request needs at its end."""
    if isinstance(loaded, tuple):
        assert loaded[1].content_hash


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


def weights_of_all_modules() -> list[torch.Tensor]:
    """Parameters and buffers of whatever is alive, each memory once."""
    gc.collect()
    modules = [thing for thing in gc.get_objects() if isinstance(thing, torch.nn.Module)]
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    return list({tensor.data_ptr(): tensor for tensor in tensors}.values())


def show(result: dict[str, Any], rows: list[Row]) -> None:
    print(f"small, torch {result['torch']}, {result['cpu']}, {result['threads']} threads")
    header = ("files", "", "seconds", "touched", "weights GB", "peak / weights", "final / weights")
    print("".join(f"{name:>18}" for name in header))
    for row in rows:
        weights_gb = row.audiocraft[0].weights_gb  # ours packs some of them, where no module shows it
        for side in SIDES:
            loads: list[Load] = getattr(row, side)
            cells = (
                row.files,
                side,
                f"{statistics.median(load.seconds for load in loads):.2f}",
                f"{statistics.median(load.touched_s for load in loads):.2f}",
                f"{weights_gb:.2f}",
                f"{max(load.peak_gb for load in loads) / weights_gb:.2f}",
                f"{max(load.final_gb for load in loads) / weights_gb:.2f}",
            )
            print("".join(f"{cell:>18}" for cell in cells))
        for what in ("seconds", "touched_s"):
            ratio = row.ratio(what)
            print(
                f"{row.files}, {what}: {min(ratio):.1f} / {statistics.median(ratio):.1f} / {max(ratio):.1f}"
            )


if __name__ == "__main__":
    sys.exit(main())
