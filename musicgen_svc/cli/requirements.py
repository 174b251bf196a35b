"""Prints requirements.txt, Cog's rendering of requirements.lock.

Cog installs cog and coglet itself, rewrites torch and torchaudio to builds for the image's CUDA
(so hashes and the nvidia-* pins of the PyPI build would contradict it), and resolves dependencies
(so audiocraft, whose pins are lifted here, is installed by cog.yaml with --no-deps instead).
"""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LEFT_TO_COG = re.compile(r"(cog|coglet|audiocraft|triton|nvidia-.*|cuda-.*)$")


def runtime_requirements(lock: str, runtime_names: set[str]) -> list[str]:
    """The lock's pins without hashes, without the dev tools and without what the image brings."""
    pins = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)( ; [^\\\n]*)?", lock, flags=re.MULTILINE)
    return [
        f"{name}=={version}{marker.rstrip()}"
        for name, version, marker in pins
        if name in runtime_names and not LEFT_TO_COG.match(name)
    ]


def runtime_names() -> set[str]:
    """Names of the packages that the service itself needs, dev tools left out."""
    compiled = subprocess.run(
        ["uv", "pip", "compile", "pyproject.toml", "--universal", "--fork-strategy", "fewest", "--quiet",
         "--no-header", "--no-annotate", "--constraint", "requirements.lock"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    return {line.split("==")[0] for line in compiled.splitlines() if "==" in line}


if __name__ == "__main__":
    lock = (ROOT / "requirements.lock").read_text()
    print("# Written by scripts/lock from requirements.lock. See musicgen_svc/cli/requirements.py.")
    print("\n".join(runtime_requirements(lock, runtime_names())))
