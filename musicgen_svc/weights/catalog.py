"""Reads `weights/manifest.json`: the models and the parts that they need. Needs no torch."""

import json
from dataclasses import dataclass
from pathlib import Path

from musicgen_svc.errors import WeightsError

MANIFEST = Path(__file__).resolve().parents[2] / "weights" / "manifest.json"
DIFFUSION_FILE = "mbd_musicgen_32khz.th"


@dataclass(frozen=True)
class Source:
    """A folder under `weights/`, and the Hugging Face repository that its files come from."""

    name: str
    repository: str
    files: tuple[str, ...]
    """File names, each of which must exist, and patterns, each of which must match a file."""
    needs: tuple[str, ...] = ()
    """The names of other sources that this one needs in order to run."""
    size_gb: float | None = None
    """The size of the files in units of 10^9 bytes, rounded; None if the manifest does not have it."""


@dataclass(frozen=True)
class Catalog:
    """Base models and the parts that they share, by name."""

    models: dict[str, Source]
    parts: dict[str, Source]
    """T5, the codec, HTDemucs and MultiBand Diffusion: what models need beside their own files."""
    aliases: dict[str, str]

    def find(self, name: str) -> Source:
        """The source called `name`, or its alias.

        Raises:
            WeightsError: there is no such source.
        """
        sources = self.models | self.parts
        source = sources.get(self.aliases.get(name, name))
        if source is None:
            names = [*self.models, *self.parts, *self.aliases]
            raise WeightsError(f"There are no weights called {name!r}; there are {', '.join(names)}.")
        return source


def read_catalog(path: Path = MANIFEST) -> Catalog:
    """The catalog in a manifest."""
    manifest = json.loads(path.read_text())
    return Catalog(
        models={
            name: Source(
                name,
                entry["repository"],
                tuple(manifest["model_files"]),
                tuple(entry["needs"]),
                entry.get("size_gb"),
            )
            for name, entry in manifest["models"].items()
        },
        parts={
            name: Source(name, entry["repository"], tuple(entry["files"]), size_gb=entry.get("size_gb"))
            for name, entry in manifest["parts"].items()
        },
        aliases=manifest["aliases"],
    )
