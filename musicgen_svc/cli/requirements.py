"""`scripts/lock`: prints requirements.txt, the part of requirements.lock that Cog's image needs.

Cog installs cog and coglet itself. It replaces torch and torchaudio by builds for the image's CUDA, so
requirements.txt has no hashes and none of the nvidia-* packages that PyPI's build of torch needs. Cog also
resolves dependencies, and does not know that pyproject.toml overrides the pins of audiocraft. cog.yaml
therefore installs audiocraft with --no-deps.
"""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LEFT_TO_COG = re.compile(r"(cog|coglet|audiocraft|triton|nvidia-.*|cuda-.*)$")


def runtime_requirements(lock: str, runtime_names: set[str]) -> list[str]:
    """Selects the lock file's pins that the image needs, without hashes.

    Args:
        lock: text of requirements.lock.
        runtime_names: packages that the service needs.
    """
    pins = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)( ; [^\\\n]*)?", lock, flags=re.MULTILINE)
    return [
        f"{name}=={version}{marker.rstrip()}"
        for name, version, marker in pins
        if name in runtime_names and not LEFT_TO_COG.match(name)
    ]


def runtime_names() -> set[str]:
    """Resolves the names of the packages that the service needs, without the development tools."""
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
