"""With downloaded weights, no start and no request uses the network, whatever the environment is."""

import os
import subprocess
import sys
from pathlib import Path

MODES = """
import asyncio, os, socket, sys, traceback
from pathlib import Path


def refuse(name):
    def refused(*args, **kwargs):  # ends the process: libraries retry for minutes, and some ignore the error
        traceback.print_stack()
        print("the network was used:", name, args[-1:], file=sys.stderr, flush=True)
        os._exit(1)
    return refused


for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, refuse(name))
for name in ("getaddrinfo", "gethostbyname", "create_connection"):
    setattr(socket, name, refuse(name))

from cog import Path as CogPath

from musicgen_svc.service import Service
from musicgen_svc.settings import Settings

weights, work, clip = Path(sys.argv[1]), Path(sys.argv[2]), CogPath(sys.argv[3])
fields = {
    "model_version": "finetuned", "prompt": "a waltz", "input_audio": None, "duration": 1,
    "continuation": False, "continuation_start": 0, "continuation_end": None, "multi_band_diffusion": False,
    "normalization_strategy": "loudness", "top_k": 250, "top_p": 0, "temperature": 1,
    "classifier_free_guidance": 3, "output_format": "wav", "seed": 5,
}
with_clip = fields | {"input_audio": clip}
modes = {
    "text": fields,
    "melody": with_clip,
    "continuation": with_clip | {"continuation": True},
    "encode-decode": with_clip | {"model_version": "encode-decode"},
    "diffusion": fields | {"multi_band_diffusion": True},
    "another model": fields | {"model_version": "small"},
}
settings = Settings(weights_dir=weights, work_dir=work, device="cpu")


def served(given, wanted):
    service = Service(settings)
    service.start(str(weights / given))
    for mode in wanted:
        assert asyncio.run(service.predict(modes[mode], lambda name, value: None)).stat().st_size > 1000, mode
        print("served", given, mode)


served("melody", modes)
served("hf-codec", ["text"])
"""


def test_every_mode_runs_without_a_network(weights: Path, tmp_path: Path) -> None:
    import numpy as np
    import soundfile

    clip = tmp_path / "clip.wav"
    soundfile.write(clip, 0.3 * np.sin(np.arange(32_000) / 30), 32_000)
    cache = tmp_path / "cache"
    cache.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"HF_HOME": str(cache), "TORCH_HOME": str(cache), "XDG_CACHE_HOME": str(cache)}
    shown = subprocess.run(
        [sys.executable, "-c", MODES, str(weights), str(tmp_path / "work"), str(clip)],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr[-4000:]
    assert shown.stdout.count("served ") == 7
    left = [path for path in cache.rglob("*") if path.is_file()]
    assert left == [], "something was downloaded"
