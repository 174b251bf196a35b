"""Reads a job file, JSONL, CSV or Parquet, into its rows as they are written. Needs no torch.

A file that is no job is refused here, with line and column, before anything is loaded: text that cannot be
parsed, columns that do not exist, no rows, and ids that cannot name a file or are not unique. Whether the
values of a row make a valid request is decided row by row, in `rows.py`.
"""

import csv
import io
import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ID = "id"
MAX_ID_BYTES = 200
"""The file system allows 255 bytes in a name; the rest is for the suffix and for temporary names."""

ParseText = Callable[[str, str], object]
"""Turns the name of an input and the text of a CSV cell into a JSON value. Other text stays text."""


class JobError(Exception):
    """The job file cannot be used. The message is one sentence with the file's line and column."""


@dataclass(frozen=True)
class WrittenRow:
    """One row as the job file has it."""

    line: int
    """The line in the file where the row starts, from 1; in Parquet the row's number, from 1."""
    id: str | None
    """None: the row has no id of its own."""
    values: dict[str, object]
    """The inputs that are given, by name. Null values and empty cells are left out."""


def read_job(path: Path, inputs: Collection[str], parse_text: ParseText) -> list[WrittenRow]:
    """Reads all rows of a job file, whose suffix tells its format.

    Args:
        path: a .jsonl, .csv or .parquet file.
        inputs: the names of the columns that are allowed beside `id`.
        parse_text: parses the cells of a CSV file.

    Raises:
        JobError: the file cannot be used.
    """
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    read = readers.get(path.suffix.lower())
    if read is None:
        raise JobError(f"{path.name} ends with {path.suffix!r}; it must be a .jsonl, .csv or .parquet file.")
    ids: dict[str, int] = {}
    rows = []
    for line, values in read(path, inputs, parse_text):
        row = _checked(path.name, line, values, inputs)
        if row.id is not None:
            if row.id in ids:
                raise JobError(
                    f"{path.name}, line {line}, column {ID}: {row.id!r} is also the id of line "
                    f"{ids[row.id]}; each id must be unique."
                )
            ids[row.id] = line
        rows.append(row)
    if not rows:
        raise JobError(f"{path.name}, line 1, column 1: there are no rows; it must have at least one.")
    return rows


def _checked(name: str, line: int, values: dict[str, object], inputs: Collection[str]) -> WrittenRow:
    """Checks the columns and the id of one row of the file called `name`."""
    for column in values:
        if column != ID and column not in inputs:
            raise _unknown(name, line, repr(column), column, inputs)
    given = {column: value for column, value in values.items() if value is not None}
    own_id = given.pop(ID, None)
    if own_id is None:
        return WrittenRow(line, None, given)
    text = str(own_id) if isinstance(own_id, str | int) and not isinstance(own_id, bool) else ""
    if not _is_file_name(text):
        raise JobError(
            f"{name}, line {line}, column {ID}: {own_id!r:.100} cannot name a file; an id is 1 to "
            f"{MAX_ID_BYTES} bytes of printable characters without '/', and does not begin with '.'."
        )
    return WrittenRow(line, text, given)


def _unknown(name: str, line: int, place: str, column: str, inputs: Collection[str]) -> JobError:
    """Returns the error for a column that does not exist. `place`: the column in the file."""
    return JobError(
        f"{name}, line {line}, column {place}: there is no input {column!r:.100}; there are {ID}, "
        f"{', '.join(inputs)}."
    )


def _is_file_name(text: str) -> bool:
    """Whether a text can be a file's name on every system, without a suffix."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return False
    return (
        0 < size <= MAX_ID_BYTES
        and text.isprintable()
        and text[0] != "."
        and not set(text) & set('/\\:*?"<>|')
    )


def _text_of(path: Path) -> str:
    """Reads a file as UTF-8, with or without a byte order mark."""
    content = _bytes_of(path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line = content.count(b"\n", 0, exc.start) + 1
        column = exc.start - content.rfind(b"\n", 0, exc.start)
        raise JobError(
            f"{path.name}, line {line}, column {column}: this is not UTF-8; save it as UTF-8."
        ) from None


def _bytes_of(path: Path) -> bytes:
    """Reads a file."""
    try:
        return path.read_bytes()
    except OSError as exc:
        raise JobError(f"{path} cannot be read ({exc.strerror}); give a file that exists.") from None


def _read_jsonl(path: Path, _: Collection[str], __: ParseText) -> Iterator[tuple[int, dict[str, object]]]:
    """Yields the line number and the object of each line that is not empty."""
    for line, text in enumerate(_text_of(path).split("\n"), 1):
        if not text.strip():
            continue

        def fail(column: int, fault: str, line: int = line) -> JobError:
            return JobError(f"{path.name}, line {line}, column {column}: {fault}.")

        def refuse(constant: str) -> None:
            raise ValueError(f"{constant} is not JSON")

        def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
            names = [name for name, _ in pairs]
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"{name!r:.100} is given twice")
            return dict(pairs)

        try:
            value = json.loads(text, parse_constant=refuse, object_pairs_hook=unique)
        except json.JSONDecodeError as exc:
            raise fail(exc.colno, f"this is not JSON ({exc.msg})") from None
        except (ValueError, RecursionError) as exc:
            raise fail(1, str(exc)) from None
        if not isinstance(value, dict):
            raise fail(1, 'each line must be an object, such as {"prompt": "a waltz"}')
        yield line, value


def _read_csv(
    path: Path, inputs: Collection[str], parse_text: ParseText
) -> Iterator[tuple[int, dict[str, object]]]:
    """Yields the starting line and the values of each row below the header. An empty cell is None."""
    reader = csv.reader(io.StringIO(_text_of(path), newline=""), strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as exc:
            raise JobError(
                f"{path.name}, line {reader.line_num}, column 1: this is not CSV ({exc})."
            ) from None
        if not any(cells):
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            for number, column in enumerate(header, 1):
                if column != ID and column not in inputs:
                    raise _unknown(path.name, line, str(number), column, inputs)
                if header.index(column) != number - 1:
                    raise JobError(f"{path.name}, line {line}, column {number}: {column!r} is given twice.")
            continue
        if len(cells) != len(header):
            raise JobError(
                f"{path.name}, line {line}, column {min(len(cells), len(header)) + 1}: the row has "
                f"{len(cells)} cells and the header has {len(header)}; both must have the same number."
            )
        values: dict[str, object] = {}
        for column, cell in zip(header, cells, strict=True):
            values[column] = None if cell == "" else cell if column == ID else parse_text(column, cell)
        yield line, values


def _read_parquet(
    path: Path, inputs: Collection[str], _: ParseText
) -> Iterator[tuple[int, dict[str, object]]]:
    """Yields the number and the values of each row."""
    parquet = import_parquet(path.name)
    from pyarrow import ArrowException

    _bytes_of(path)
    try:
        table = parquet.read_table(path)
    except (ArrowException, OSError) as exc:
        raise JobError(
            f"{path.name}, line 1, column 1: this is not Parquet ({str(exc).splitlines()[0]:.200})."
        ) from None
    for number, column in enumerate(table.column_names, 1):
        if column != ID and column not in inputs:
            raise _unknown(path.name, 1, str(number), column, inputs)
    yield from enumerate(table.to_pylist(), 1)


def write_parquet(results: Path) -> Path:
    """Writes a JSONL file of results as Parquet beside it, atomically. Returns the path."""
    from pyarrow import json as arrow_json

    path = results.with_suffix(".parquet")
    temporary = path.with_name(f"{path.name}.partial")
    table = arrow_json.read_json(results, read_options=arrow_json.ReadOptions(block_size=2**24))
    import_parquet("--parquet").write_table(table, temporary)
    temporary.replace(path)
    return path


def import_parquet(what: str) -> Any:
    """Imports what reads and writes Parquet, which comes with the Ray extra.

    Raises:
        JobError: it is not installed. `what` begins the sentence.
    """
    try:
        from pyarrow import parquet
    except ImportError:
        raise JobError(
            f"{what} is Parquet, for which pyarrow is missing: it comes with the Ray extra, which "
            "scripts/ray --version installs; or use JSONL or CSV."
        ) from None
    return parquet
