"""Tiny random checkpoints in the official on-disk formats, laid out as the service's `weights/`.

They say nothing musical: they are for tests, where every key, shape, flag and file has to be the one
that the released files have, and where a condition, a seed or a code that changes must be heard.
Same source, same bytes: every part is made under its own seed, on one thread.

    python scripts/_tiny_weights.py DIR

    small/ stereo/          text models: 4 codebooks, and 8 interleaved ones
    melody/                 chroma and text as a prefix, no cross-attention
    hf-codec/               a text model whose codec file only points to facebook/encodec_32khz
    t5-small/ htdemucs/ encodec_32khz/ multiband-diffusion/      what the models need beside them
"""

import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from _tiny_codecs import codec_checkpoint, hf_codec, seeded
from _tiny_models import diffusion_checkpoint, lm_checkpoint, lm_config, save_t5

REVISION = "0" * 40  # of every repository in the pretended hub cache
HUB = {
    "t5-small": "t5-small",
    "htdemucs": "adefossez/HTDemucs",
    "encodec_32khz": "facebook/encodec_32khz",
}


def home(root: Path) -> Path:
    """Where `ensure(root)` puts the folder: named after the content of what makes it."""
    makers = (*sorted(Path(__file__).parent.glob("_tiny_*.py")), root / "training" / "separator.py")
    made_by = hashlib.sha256(b"".join(maker.read_bytes() for maker in makers))
    return root / ".cache" / f"tiny-weights-{made_by.hexdigest()[:12]}"


def ensure(root: Path) -> Path:
    """The folder, built on the first call; several processes may ask at once."""
    final = home(root)
    if not final.is_dir():
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=final.name + ".", dir=final.parent))
        try:
            build(temporary)
            with contextlib.suppress(OSError):  # another process was first: its bytes are these bytes
                temporary.rename(final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        assert final.is_dir(), f"{final} could not be made"
    return final


def build(folder: Path) -> None:
    """Writes everything into `folder`."""
    from transformers.utils import logging

    from training.separator import save_separator

    logging.disable_progress_bar()
    for name in ("small", "melody", "stereo", "hf-codec", "multiband-diffusion"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with seeded(1):
        save_t5(folder / "t5-small")
        save_separator(folder / "htdemucs")
    with seeded(2):
        codec = codec_checkpoint()
    with seeded(3):
        hf_codec().save_pretrained(folder / "encodec_32khz")
    with seeded(4):
        torch.save(diffusion_checkpoint(), folder / "multiband-diffusion" / "mbd_musicgen_32khz.th")
    for seed, name in enumerate(("small", "melody", "stereo", "hf-codec"), 5):
        with seeded(seed):
            torch.save(lm_checkpoint(lm_config(name)), folder / name / "state_dict.bin")
        pointer = {"pretrained": "facebook/encodec_32khz", "exported": True, "version": "1.3.0"}
        package = pointer if name == "hf-codec" else codec
        torch.save(package, folder / name / "compression_state_dict.bin")


def hub_cache(weights: Path, cache: Path) -> None:
    """Lays `weights` out in `cache` as a Hugging Face cache, for audiocraft, which loads by name."""
    for folder, repository in HUB.items():
        if not (weights / folder).is_dir():
            continue
        home = cache / f"models--{repository.replace('/', '--')}"
        (home / "refs").mkdir(parents=True, exist_ok=True)
        (home / "refs" / "main").write_text(REVISION)
        snapshot = home / "snapshots" / REVISION
        snapshot.mkdir(parents=True, exist_ok=True)
        for file in (weights / folder).iterdir():
            link = snapshot / file.name
            if not link.exists():
                link.unlink(missing_ok=True)
                with contextlib.suppress(FileExistsError):  # another process made it meanwhile
                    link.symlink_to(file.resolve())


if __name__ == "__main__":
    sys.path.insert(0, os.fspath(Path(__file__).resolve().parent.parent))
    build(Path(sys.argv[1]))
