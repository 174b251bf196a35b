"""`scripts/lock`: prints the other two lists of packages, beside requirements.lock.

    requirements.py image    requirements.txt: what Cog's image needs
    requirements.py ray      requirements-ray.lock: what the Ray extra adds to the service

Cog installs cog and coglet itself. It replaces torch and torchaudio by builds for the image's CUDA, so
requirements.txt has no hashes and none of the nvidia-* packages that PyPI's build of torch needs. Cog also
resolves dependencies, and does not know that pyproject.toml overrides the pins of audiocraft. cog.yaml
therefore installs audiocraft with --no-deps.

The Ray extra is resolved with every version of requirements.lock as it is, so it can be added to an
environment that is there.
"""

import re
import subprocess
import sys
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


def added_requirements(compiled: str, runtime_names: set[str]) -> str:
    """Selects what an extra adds to the service: names, versions, markers and hashes.

    Args:
        compiled: the service with the extra, as `uv pip compile --generate-hashes` prints it.
        runtime_names: packages that the service needs without it.
    """
    blocks = re.split(r"^(?=[A-Za-z0-9])", compiled, flags=re.MULTILINE)
    return "".join(block for block in blocks if block.split("==")[0] not in runtime_names).strip()


def runtime_names() -> set[str]:
    """Resolves the names of the packages that the service needs, without the development tools."""
    return {line.split("==")[0] for line in compiled().splitlines() if "==" in line}


def compiled(*options: str) -> str:
    """Resolves pyproject.toml with the versions of requirements.lock. Returns what uv prints."""
    return subprocess.run(
        ["uv", "pip", "compile", "pyproject.toml", "--universal", "--fork-strategy", "fewest", "--quiet",
         "--no-header", "--no-annotate", "--constraint", "requirements.lock", *options],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip


def main() -> None:
    """Prints the list that the command line names."""
    (wanted,) = sys.argv[1:]
    written = "Written by scripts/lock"
    if wanted == "image":
        lock = (ROOT / "requirements.lock").read_text()
        print(f"# {written} from requirements.lock. See musicgen_svc/cli/requirements.py.")
        print("\n".join(runtime_requirements(lock, runtime_names())))
    else:
        assert wanted == "ray", wanted
        print(f"# {written}: what the Ray extra adds. See musicgen_svc/cli/requirements.py.")
        print(added_requirements(compiled("--extra", "ray", "--generate-hashes"), runtime_names()))


if __name__ == "__main__":
    main()
