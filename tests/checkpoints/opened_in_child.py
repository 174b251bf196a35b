"""Opens checkpoints as the service does, one after the other, in a process with a limit on its memory.

    python opened_in_child.py WEIGHTS

Reads a path from each line of its standard input, and answers each with a line of JSON: `error`, the message
of a WeightsError; `raw`, the name of any other exception; or neither, if the model generated; and `grown_mb`,
by how much the peak of the process's memory grew. SIGALRM ends the process if a checkpoint takes too long:
then the checkpoint has no answer.
"""

import gc
import json
import os
import resource
import signal
import sys
from pathlib import Path

import torch

from musicgen_svc.checkpoints.field_types import quoted
from musicgen_svc.engine.sampling_params import SamplingParams
from musicgen_svc.errors import WeightsError
from musicgen_svc.loading.loader import Loader
from musicgen_svc.settings import Settings
from musicgen_svc.weights.catalog import read_catalog
from musicgen_svc.weights.paths import Weights

LIMIT_S = 60
"""The time for one checkpoint on a busy machine. None of the tests' takes more than a few seconds."""
LIMIT_BYTES = 3 << 30
"""How much the process may allocate in addition to what it has when it starts to answer."""


def generated(weights: Path, given: str) -> None:
    """Loads a checkpoint and generates two frames; also uses a melody and diffusion if it can."""
    loader = Loader(Weights.at(weights, read_catalog(), given), torch.device("cpu"), Settings())
    has_diffusion = (Path(given) / "multiband-diffusion").is_dir()
    if has_diffusion:  # before the model: most checkpoints of the tests with one are refused because of it
        loader.diffusion(Path(given), loader.codec()[1])
    model = loader.start()
    conditions = model.conditioner.text("rock")
    if model.conditioner.takes_melody:
        noise = torch.rand(1, model.codec.sample_rate, generator=torch.Generator().manual_seed(0)) - 0.5
        conditions = conditions | model.conditioner.melody(noise)
    tokens = model.engine.generate(
        conditions, prompt=None, length=2, sampling=SamplingParams(), generator=torch.Generator()
    )
    wav = model.codec.decode(tokens)
    if has_diffusion:
        wav = loader.diffusion(model.path, model.codec).decode(tokens)
    assert wav.isfinite().all(), "what was generated is not finite"


def main() -> None:
    weights = Path(sys.argv[1])
    torch.set_num_threads(1)
    generated(weights, str(weights / "melody"))  # so that what is imported and cached is not counted
    gc.freeze()  # each load collects garbage, and need not look at all that was imported
    own = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData")
    )
    limit = int(own.split()[1]) * 1024 + LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    print("ready", flush=True)
    for line in sys.stdin:
        signal.alarm(LIMIT_S)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        answer: dict[str, object] = {}
        try:
            generated(weights, line.rstrip("\n"))
        except WeightsError as exc:
            answer["error"] = str(exc)
        except BaseException as exc:
            answer["raw"] = f"{type(exc).__name__}: {quoted(str(exc))}"
        signal.alarm(0)
        answer["grown_mb"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    main()
