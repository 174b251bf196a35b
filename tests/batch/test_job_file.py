"""Job files: what is read, and each fault with its line and column."""

from pathlib import Path

import pytest

from musicgen_svc.batch.job_file import JobError, WrittenRow, read_job
from musicgen_svc.cli.schema_fields import fields, parsed
from tests.cli.repository import SCHEMA

INPUTS = fields(SCHEMA) or {}


def read(path: Path, text: str | bytes) -> list[WrittenRow]:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_job(path, INPUTS, lambda name, cell: parsed(cell, INPUTS[name]))


def test_jsonl_and_csv_give_the_same_rows(tmp_path: Path) -> None:
    jsonl = (
        '{"id": "one", "prompt": "a \\"waltz\\",\\nslow", "duration": 2, "temperature": 0.5}\n\n'
        '{"id": 2, "input_audio": "a b.wav", "continuation": true, "seed": null}\n'
    )
    csv = (
        "\ufeffid,prompt,duration,temperature,input_audio,continuation,seed\r\n"
        'one,"a ""waltz"",\nslow",2,0.5,,,\r\n\r\n'
        "2,,,,a b.wav,true,\r\n"
    )
    expected: list[dict[str, object]] = [
        {"prompt": 'a "waltz",\nslow', "duration": 2, "temperature": 0.5},
        {"input_audio": "a b.wav", "continuation": True},
    ]
    for rows in (read(tmp_path / "jobs.jsonl", jsonl), read(tmp_path / "jobs.CSV", csv)):
        assert [row.id for row in rows] == ["one", "2"]
        assert [row.values for row in rows] == expected


def test_the_line_of_a_row_is_where_it_starts(tmp_path: Path) -> None:
    rows = read(tmp_path / "jobs.csv", 'prompt,duration\n"two\nlines",1\nthird,1\n')
    assert [row.line for row in rows] == [2, 4]


def test_text_that_has_another_type_stays_for_the_services_own_sentence(tmp_path: Path) -> None:
    (row,) = read(tmp_path / "jobs.csv", "prompt,duration\na waltz,long\n")
    assert row.values["duration"] == "long"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "jobs.jsonl, line 1, column 1: there are no rows"),
        ("\n \n", "jobs.jsonl, line 1, column 1: there are no rows"),
        (
            '{"prompt": "a"}\n{"promt": "a"}',
            "jobs.jsonl, line 2, column 'promt': there is no input 'promt'; there",
        ),
        (
            '{"prompt": "a"}\n{"prompt": }',
            "jobs.jsonl, line 2, column 12: this is not JSON (Expecting value)",
        ),
        ('["a"]', "jobs.jsonl, line 1, column 1: each line must be an object"),
        ('{"top_p": NaN}', "jobs.jsonl, line 1, column 1: NaN is not JSON"),
        ('{"seed": 1, "seed": 2}', "jobs.jsonl, line 1, column 1: 'seed' is given twice"),
        ("[" * 100_000, "jobs.jsonl, line 1, column 1: "),
        (
            '{"id": "a", "prompt": "x"}\n{"id": "b"}\n{"id": "a"}',
            "jobs.jsonl, line 3, column id: 'a' is also the id of line 1",
        ),
        ('{"id": 1}\n{"id": "1"}', "jobs.jsonl, line 2, column id: '1' is also the id of line 1"),
        (b'{"prompt": "a"}\n{"prompt": "\xff"}', "jobs.jsonl, line 2, column 13: this is not UTF-8"),
    ],
)
def test_a_wrong_jsonl_file_is_refused_with_line_and_column(
    tmp_path: Path, text: str | bytes, sentence: str
) -> None:
    with pytest.raises(JobError) as refused:
        read(tmp_path / "jobs.jsonl", text)
    assert str(refused.value).startswith(sentence)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "jobs.csv, line 1, column 1: there are no rows"),
        ("prompt,duration\n", "jobs.csv, line 1, column 1: there are no rows"),
        ("prompt,promt\na,b\n", "jobs.csv, line 1, column 2: there is no input 'promt'; there are id, "),
        ("prompt,prompt\na,b\n", "jobs.csv, line 1, column 2: 'prompt' is given twice"),
        ("prompt,seed\na,1,2\n", "jobs.csv, line 2, column 3: the row has 3 cells and the header has 2"),
        ("prompt,seed\na\n", "jobs.csv, line 2, column 2: the row has 1 cells and the header has 2"),
        ('prompt\n"a\n', "jobs.csv, line 2, column 1: this is not CSV (unexpected end of data)"),
        ("id,prompt\na,x\na,y\n", "jobs.csv, line 3, column id: 'a' is also the id of line 2"),
    ],
)
def test_a_wrong_csv_file_is_refused_with_line_and_column(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(JobError) as refused:
        read(tmp_path / "jobs.csv", text)
    assert str(refused.value).startswith(sentence)


@pytest.mark.parametrize(
    "name", ["a/b", "..", ".hidden", "", "a\\tb", "x" * 201, "é" * 101, "a:b", True, 1.5, []]
)
def test_an_id_that_cannot_name_a_file_is_refused(tmp_path: Path, name: object) -> None:
    row = {"id": name, "prompt": "a waltz"}
    import json

    with pytest.raises(JobError, match=r"^jobs\.jsonl, line 1, column id: .* cannot name a file; an id is"):
        read(tmp_path / "jobs.jsonl", json.dumps(row).replace("\\\\", "\\"))


def test_another_kind_of_file_is_refused_by_its_suffix(tmp_path: Path) -> None:
    with pytest.raises(
        JobError, match=r"^jobs\.txt ends with '\.txt'; it must be a \.jsonl, \.csv or \.parquet"
    ):
        read(tmp_path / "jobs.txt", "a waltz")
    with pytest.raises(JobError, match=r"cannot be read \(No such file or directory\)"):
        read_job(tmp_path / "absent.jsonl", INPUTS, lambda name, cell: cell)
