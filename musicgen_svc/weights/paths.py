"""Finds the path of each model and part on this machine. Base models are downloaded by `cli/`."""

from dataclasses import dataclass
from pathlib import Path

from musicgen_svc.checkpoints.unpacking import remove_leftovers as remove_unpacked_leftovers
from musicgen_svc.errors import WeightsError
from musicgen_svc.settings import Settings
from musicgen_svc.weights.catalog import Catalog
from musicgen_svc.weights.cog_weights import is_url, path_exists, quoted_path
from musicgen_svc.weights.url_cache import remove_leftovers as remove_fetched_leftovers

FINETUNED = "finetuned"
DEMO = Path(__file__).resolve().parents[2] / "weights" / "8songs"
"""The demo model, which is part of the repository and does not depend on where the other weights are."""
UNPACKED = ".unpacked"
FETCHED = ".fetched"


def local_path(cog_weights: str | None, settings: Settings) -> str | None:
    """The path that COG_WEIGHTS means: a URL is fetched into a file, any other value is returned as it is.

    Raises:
        WeightsError: the URL is not allowed, or cannot be fetched.
    """
    cache = settings.weights_dir / FETCHED
    if not cog_weights or not is_url(cog_weights):
        remove_fetched_leftovers(cache)
        return cog_weights
    from musicgen_svc.weights.remote import fetch  # importing an HTTP client takes long
    from musicgen_svc.weights.url_rules import Rules

    hosts = tuple(host.strip().lower() for host in settings.weights_hosts.split(",") if host.strip())
    rules = Rules(hosts, int(settings.weights_max_gb * 1e9))
    return str(fetch(cog_weights, cache, rules))


@dataclass(frozen=True)
class Weights:
    """The paths of the checkpoints and of the parts that they share."""

    folder: Path
    """The folder of the base models and parts."""
    catalog: Catalog
    finetuned: Path | None
    """The file or folder of the model `finetuned`; None if there is none, not even the demo model."""
    is_demo: bool = False
    """Whether `finetuned` is the demo model."""

    @classmethod
    def at(cls, folder: Path, catalog: Catalog, given: str | None, demo: Path = DEMO) -> "Weights":
        """The paths below `folder`; also removes what interrupted unpackings left there.

        Args:
            given: the path in COG_WEIGHTS. It is preferred to `folder`/finetuned, and that to the demo model.

        Raises:
            WeightsError: `given` is a path at which there is nothing.
        """
        remove_unpacked_leftovers(folder / UNPACKED)
        if given:
            if not path_exists(given):
                raise WeightsError(f"COG_WEIGHTS is {quoted_path(given)}, where there is nothing.")
            return cls(folder, catalog, Path(given))
        if _is_filled_folder(folder / FINETUNED):
            return cls(folder, catalog, folder / FINETUNED)
        if _is_filled_folder(demo):
            return cls(folder, catalog, demo, is_demo=True)
        return cls(folder, catalog, None)

    def base_models(self) -> list[str]:
        """The base models that are present, in the manifest's order."""
        return [name for name in self.catalog.models if _is_filled_folder(self.folder / name)]

    def model_path(self, name: str) -> Path:
        """The path of a model.

        Raises:
            WeightsError: there is no such model; the message says how to get it.
        """
        if name == FINETUNED:
            if self.finetuned is None:
                missing = "model_version 'finetuned' has no weights here"
                raise WeightsError(
                    f"{missing}: put a checkpoint into {self.folder / FINETUNED}, or name one in "
                    f"COG_WEIGHTS; {self._alternatives()}.",
                    for_client=f"{missing}; {self._alternatives()}.",
                )
            return self.finetuned
        if name not in self.base_models():
            sentence = (
                f"model_version {name!r} has no weights here: run scripts/download_weights {name}; "
                f"{self._alternatives()}."
            )
            raise WeightsError(sentence, for_client=sentence)
        return self.folder / name

    def base_path(self, repository: str) -> Path:
        """The path of the model that an adapter was trained on, by its Hugging Face repository.

        Raises:
            WeightsError: it is not one of the base models, or it is not present.
        """
        for name, source in self.catalog.models.items():
            if repository in (source.repository, name):
                return self.model_path(name)
        raise WeightsError(
            f"The adapter was trained on {repository!r:.80}, which is none of "
            f"{', '.join(source.repository for source in self.catalog.models.values())}."
        )

    def part_path(self, name: str, checkpoint: Path) -> Path:
        """The folder of a part: inside the checkpoint, else beside it, else among all weights.

        Raises:
            WeightsError: it is in none of these.
        """
        candidates = [checkpoint / name, checkpoint.parent / name, self.folder / name]
        is_unpacked = (self.folder / UNPACKED) in checkpoint.parents
        if self.finetuned and is_unpacked:  # then "beside it" also means beside the archive
            candidates.insert(2, self.finetuned.parent / name)
        for candidate in candidates:
            if candidate.is_dir():
                return candidate
        parents = " or ".join(str(candidate.parent) for candidate in dict.fromkeys(candidates))
        remedy = f"run scripts/download_weights {name}"
        raise WeightsError(
            f"{checkpoint.name} needs {name}, which is not in {parents}: {remedy}.",
            for_client=f"{checkpoint.name} needs {name}, which this server does not have: {remedy} there.",
        )

    def _alternatives(self) -> str:
        """The models that are present, as a clause."""
        present = self.base_models() + ([FINETUNED] if self.finetuned else [])
        return f"present are {', '.join(present)}" if present else "no model is present"


def _is_filled_folder(folder: Path) -> bool:
    """Whether the folder exists and is not empty."""
    return folder.is_dir() and any(folder.iterdir())
