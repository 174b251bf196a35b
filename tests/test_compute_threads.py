"""Each request computes with the number of threads of its model, also without the variables of the suite."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SERVE = """
import asyncio, json, os, sys
from pathlib import Path
import torch
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 3)))  # as on a machine with three cores
from musicgen_svc.runtime import threads
threads.cores = lambda: 3
threads.SMALL_PARAMETERS = int(sys.argv[2])
from musicgen_svc.engine.batch import Batch
from musicgen_svc.engine.ragged import RaggedBatch
from musicgen_svc.models.encodec import Codec
from musicgen_svc.service import Service
from musicgen_svc.settings import Settings
from fields import FIELDS
from sounds import encode, tone

seen = {}
def watched(owner, name):
    real = getattr(owner, name)
    def call(*args, **kwargs):
        seen.setdefault(name, set()).add(torch.get_num_threads())
        return real(*args, **kwargs)
    setattr(owner, name, call)
for owner, name in ((RaggedBatch, "open"), (RaggedBatch, "step"), (Codec, "encode"), (Codec, "decode")):
    watched(owner, name)

weights, clip = Path(sys.argv[1]), Path(sys.argv[3])
clip.write_bytes(encode(tone(330.0, 1.0, 32_000), 32_000, "wav16"))
service = Service(Settings.from_environment(
    {**os.environ, "MUSICGEN_WEIGHTS_DIR": str(weights), "MUSICGEN_SLOTS": "2", "COG_MAX_CONCURRENCY": "2"}
))
service.start(str(weights / "small"))
async def main():
    continued = FIELDS | {"input_audio": clip, "continuation": True}
    both = [service.predict(fields, lambda *_: None) for fields in (FIELDS, continued)]
    await asyncio.gather(*both)
    await service.predict(continued | {"model_version": "encode-decode"}, lambda *_: None)
asyncio.run(main())
print(json.dumps({name: sorted(counts) for name, counts in seen.items()}))
"""


def threads_of(weights: Path, clip: Path, small_parameters: int, **variables: str) -> dict[str, list[int]]:
    """Serves requests in a process of its own. Returns each kind of work's numbers of threads."""
    own = {name: value for name, value in os.environ.items() if "NUM_THREADS" not in name}
    done = subprocess.run(
        [sys.executable, "-c", SERVE, str(weights), str(small_parameters), str(clip)],
        env=own | variables | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, list[int]] = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == {"open", "step", "encode", "decode"}
    return found


@pytest.mark.parametrize(
    ("small_parameters", "variables", "expected"),
    [(10**9, {}, 1), (1, {}, 3), (10**9, {"OMP_NUM_THREADS": "2"}, 2)],
    ids=["a small model", "a large model", "the user's own number"],
)
def test_a_request_computes_with_its_models_number_of_threads(
    small_parameters: int, variables: dict[str, str], expected: int, weights: Path, tmp_path: Path
) -> None:
    found = threads_of(weights, tmp_path / "clip.wav", small_parameters, **variables)
    assert set(map(tuple, found.values())) == {(expected,)}
