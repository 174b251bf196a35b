"""Names -> folders on this machine. Nothing here downloads: see scripts/download_weights."""

from dataclasses import dataclass
from pathlib import Path

from musicgen_svc.catalog import LM_FILE, Catalog
from musicgen_svc.errors import WeightsError

FINETUNED = "finetuned"
DEMO = "8songs"


@dataclass(frozen=True)
class Weights:
    """Where checkpoints and the components they share lie."""

    folder: Path
    catalog: Catalog
    finetuned: Path | None
    """The checkpoint given to `setup(weights)`, if any."""

    @classmethod
    def at(cls, folder: Path, catalog: Catalog, given: str | None) -> "Weights":
        """`given`: the path in COG_WEIGHTS, which comes before `finetuned` and `8songs` in `folder`.

        Raises:
            WeightsError: a checkpoint was given and is not there.
        """
        if given:
            if "://" in given:
                raise WeightsError(f"COG_WEIGHTS is {given!r}; it must be a folder on this machine.")
            path = Path(given)
            if not (path / LM_FILE).is_file():
                raise WeightsError(f"COG_WEIGHTS is {given!r}, where there is no {LM_FILE}.")
            return cls(folder, catalog, path)
        present = [folder / name for name in (FINETUNED, DEMO) if (folder / name / LM_FILE).is_file()]
        return cls(folder, catalog, present[0] if present else None)

    def base_models(self) -> list[str]:
        """The base models that are present, in the manifest's order."""
        return [name for name in self.catalog.models if (self.folder / name / LM_FILE).is_file()]

    def model(self, name: str) -> Path:
        """The folder of a model.

        Raises:
            WeightsError: it is not there; the message says how to get it.
        """
        if name == FINETUNED:
            if self.finetuned is None:
                raise WeightsError(
                    f"model_version 'finetuned' has no weights here: put a checkpoint into "
                    f"{self.folder / FINETUNED}, or name one in COG_WEIGHTS; {self._alternatives()}."
                )
            return self.finetuned
        path = self.folder / name
        if not (path / LM_FILE).is_file():
            raise WeightsError(
                f"model_version {name!r} has no weights here: run scripts/download_weights {name}; "
                f"{self._alternatives()}."
            )
        return path

    def component(self, name: str, checkpoint: Path) -> Path:
        """The folder of a component: the checkpoint's own, else one beside it, else the common one.

        Raises:
            WeightsError: it is in none of them.
        """
        places = [checkpoint / name, checkpoint.parent / name, self.folder / name]
        for place in places:
            if place.is_dir():
                return place
        parents = " or ".join(str(place.parent) for place in dict.fromkeys(places))
        raise WeightsError(
            f"{checkpoint.name} needs {name}, which is not in {parents}: run scripts/download_weights {name}."
        )

    def _alternatives(self) -> str:
        present = self.base_models() + ([FINETUNED] if self.finetuned else [])
        return f"present are {', '.join(present)}" if present else "no model is present"
