"""Turns the rows of a job file into requests with settled ids and seeds. Needs no torch."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from musicgen_svc.batch.job_file import JobError, WrittenRow
from musicgen_svc.errors import InputError
from musicgen_svc.request import Request

Fields = dict[str, object]

_ID_DIGITS = 16
_URL = re.compile("https?://", re.IGNORECASE)


@dataclass(frozen=True)
class Row:
    """One row of a job, with everything that decides its file."""

    id: str
    fields: Fields
    """All inputs by name, as JSON values, with defaults and the seed. `input_audio` is as it was given."""
    clip: str | None
    """The absolute path or the URL of `input_audio`."""
    error: str | None
    """The sentence that says why this is no request; None: it is one."""

    @property
    def model(self) -> str:
        """The name of the model that makes the row's file."""
        return str(self.fields["model_version"])

    @property
    def generated_s(self) -> int:
        """The seconds of audio that a model generates for the row; 0 for encode-decode."""
        return 0 if self.model == "encode-decode" or self.error else int(str(self.fields["duration"]))


def settle(
    written: Iterable[WrittenRow],
    *,
    defaults: Mapping[str, object],
    folder: Path,
    seed: int,
    max_duration_s: int,
) -> list[Row]:
    """Gives each row an id, a seed and the default of every input that it leaves out.

    The id of a row that has none is a hash of its values and of how many equal rows come before it. The seed
    of a row that has none is a hash of its id and of the job's seed. So neither changes when other rows are
    added, removed or sorted.

    Args:
        written: the rows of the job file.
        defaults: every input with its default.
        folder: that of the job file, to which the paths of clips are relative.
        seed: of the job.
        max_duration_s: the operator's limit for `duration`.

    Raises:
        JobError: a row was given the id that another row would get.
    """
    seen: Counter[str] = Counter()
    rows: dict[str, Row] = {}
    for row in written:
        fields = {**defaults, **row.values}
        digest = _hash(json.dumps(fields, sort_keys=True, default=repr))
        row_id = row.id or _hash(f"{digest} {seen[digest]}")[:_ID_DIGITS]
        seen[digest] += 1
        if row_id in rows:
            raise JobError(
                f"The row in line {row.line} has no id and would get {row_id!r}, which another row has."
            )
        rows[row_id] = _settled(row_id, fields, folder, seed, max_duration_s)
    return list(rows.values())


def _settled(row_id: str, fields: Fields, folder: Path, job_seed: int, max_duration_s: int) -> Row:
    """Makes one row. Values that are no request become its error."""
    clip = None
    if fields["seed"] in (None, -1):
        fields["seed"] = int(_hash(f"{job_seed} {row_id}")[:8], 16)
    try:
        clip = _clip(fields["input_audio"], folder)
        _check_switches(fields)
        request = Request.from_fields(fields | {"input_audio": Path(clip) if clip else None}, max_duration_s)
    except InputError as exc:
        return Row(row_id, fields, clip, str(exc))
    return Row(row_id, fields | _as_used(request), clip, None)


def _check_switches(fields: Fields) -> None:
    """Checks that switches are true or false. Over HTTP, Cog's schema does."""
    for name in ("continuation", "multi_band_diffusion"):
        if not isinstance(fields[name], bool):
            raise InputError(f"{name} is {fields[name]!r:.80}; it must be true or false.")


def _clip(value: object, folder: Path) -> str | None:
    """Returns the absolute path or the URL of a clip."""
    if value is None:
        return None
    if not isinstance(value, str) or not value.strip():
        raise InputError(
            f"input_audio is {value!r:.80}; it must be a path or an http(s) URL of an audio file."
        )
    return value if is_url(value) else str((folder / value).absolute())


def is_url(clip: str) -> bool:
    """Whether a clip is a URL, and not a path."""
    return _URL.match(clip) is not None


def _as_used(request: Request) -> Fields:
    """Returns the inputs whose values a request may change: 8.0 becomes 8, and an empty prompt null."""
    sampling = request.sampling
    return {
        "prompt": request.prompt,
        "duration": request.duration_s,
        "continuation_start": request.start_s,
        "continuation_end": request.end_s,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "temperature": sampling.temperature,
        "classifier_free_guidance": sampling.guidance,
        "seed": request.seed,
    }


def _hash(text: str) -> str:
    """Returns the sha256 of a text, in hex."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
