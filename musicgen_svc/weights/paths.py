"""Names -> paths on this machine. Base models are not downloaded here: see scripts/download_weights."""

from dataclasses import dataclass
from pathlib import Path

from musicgen_svc.checkpoints.unpacking import sweep as sweep_unpacked
from musicgen_svc.errors import WeightsError
from musicgen_svc.settings import Settings
from musicgen_svc.weights.catalog import Catalog
from musicgen_svc.weights.fetched import sweep as sweep_fetched
from musicgen_svc.weights.given_path import exists, is_url, shown

FINETUNED = "finetuned"
DEMO = Path(__file__).resolve().parents[2] / "weights" / "8songs"
"""The model that comes with the service, wherever the other weights are."""
UNPACKED = ".unpacked"
FETCHED = ".fetched"


def local(given: str | None, settings: Settings) -> str | None:
    """COG_WEIGHTS as a path on this machine: what a URL names is fetched, anything else stays as it is.

    Raises:
        WeightsError: the URL is not allowed, or cannot be fetched.
    """
    cache = settings.weights_dir / FETCHED
    if not given or not is_url(given):
        sweep_fetched(cache)
        return given
    from musicgen_svc.weights.remote import fetch  # an HTTP client takes its time to import
    from musicgen_svc.weights.url_rules import Rules

    hosts = tuple(host.strip().lower() for host in settings.weights_hosts.split(",") if host.strip())
    rules = Rules(hosts, int(settings.weights_max_gb * 1e9))
    return str(fetch(given, cache, rules))


@dataclass(frozen=True)
class Weights:
    """Where checkpoints and the components they share lie."""

    folder: Path
    catalog: Catalog
    finetuned: Path | None
    """The checkpoint of `finetuned`, a file or a folder, if there is one: the demo model at least."""
    is_demo: bool = False
    """Whether that is the demo model."""

    @classmethod
    def at(cls, folder: Path, catalog: Catalog, given: str | None, demo: Path = DEMO) -> "Weights":
        """`given`: the path in COG_WEIGHTS, which comes before `finetuned` in `folder` and the demo model.

        Raises:
            WeightsError: a checkpoint was given and is not there.
        """
        sweep_unpacked(folder / UNPACKED)
        if given:
            if not exists(given):
                raise WeightsError(f"COG_WEIGHTS is {shown(given)}, where there is nothing.")
            return cls(folder, catalog, Path(given))
        if _holds_something(folder / FINETUNED):
            return cls(folder, catalog, folder / FINETUNED)
        if _holds_something(demo):
            return cls(folder, catalog, demo, is_demo=True)
        return cls(folder, catalog, None)

    def base_models(self) -> list[str]:
        """The base models that are present, in the manifest's order."""
        return [name for name in self.catalog.models if _holds_something(self.folder / name)]

    def model(self, name: str) -> Path:
        """Where a model lies.

        Raises:
            WeightsError: it is not there; the message says how to get it.
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

    def base(self, repository: str) -> Path:
        """Where the model lies that an adapter was trained on, by its Hugging Face repository.

        Raises:
            WeightsError: it is none of the base models, or not present.
        """
        for name, source in self.catalog.models.items():
            if repository in (source.repository, name):
                return self.model(name)
        raise WeightsError(
            f"The adapter was trained on {repository!r:.80}, which is none of "
            f"{', '.join(source.repository for source in self.catalog.models.values())}."
        )

    def component(self, name: str, checkpoint: Path) -> Path:
        """The folder of a component: the checkpoint's own, else one beside it, else the common one.

        Raises:
            WeightsError: it is in none of them.
        """
        places = [checkpoint / name, checkpoint.parent / name, self.folder / name]
        if (
            self.finetuned and (self.folder / UNPACKED) in checkpoint.parents
        ):  # an archive that lies elsewhere
            places.insert(2, self.finetuned.parent / name)
        for place in places:
            if place.is_dir():
                return place
        parents = " or ".join(str(place.parent) for place in dict.fromkeys(places))
        remedy = f"run scripts/download_weights {name}"
        raise WeightsError(
            f"{checkpoint.name} needs {name}, which is not in {parents}: {remedy}.",
            for_client=f"{checkpoint.name} needs {name}, which this server does not have: {remedy} there.",
        )

    def _alternatives(self) -> str:
        present = self.base_models() + ([FINETUNED] if self.finetuned else [])
        return f"present are {', '.join(present)}" if present else "no model is present"


def _holds_something(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())
