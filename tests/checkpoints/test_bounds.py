"""Each crafted checkpoint is refused in one sentence within bounds of time and memory, or can generate."""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from file_makers import Files, Make, codec_field, json_fields, lm_field
from hostile_cases import CASES, VALID
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from musicgen_svc.checkpoints import part_field_tables, pickle_scan
from musicgen_svc.checkpoints.unpickle import load_pickle
from musicgen_svc.errors import WeightsError
from tests.fixtures import tiny_codecs, tiny_models

CHILD = Path(__file__).with_name("opened_in_child.py")
MAX_GROWN_MB = 1200


class Child:
    """The process that opens checkpoints. It is started again if it ended without an answer."""

    def __init__(self, weights: Path) -> None:
        self._weights = weights
        self._process: subprocess.Popen[str] | None = None

    def open(self, path: Path) -> dict[str, Any]:
        if self._process is None:
            command = [sys.executable, str(CHILD), str(self._weights)]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            assert self._process.stdout is not None and self._process.stdout.readline() == "ready\n"
        assert self._process.stdin is not None and self._process.stdout is not None
        print(path, file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._process = None
            pytest.fail(f"opening {path} did not end: the process ended with {code}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()


@pytest.fixture(scope="module")
def child(weights: Path) -> Iterator[Child]:
    own = Child(weights)
    yield own
    own.close()


@pytest.mark.parametrize("name", CASES)
def test_a_crafted_checkpoint_is_refused_in_one_sentence(
    name: str, child: Child, weights: Path, tmp_path: Path
) -> None:
    make, message = CASES[name]
    make(Files(weights, tmp_path))
    answer = child.open(tmp_path)
    assert "raw" not in answer, answer["raw"]
    assert "error" in answer, "it loaded and generated"
    said = answer["error"]
    assert re.search(message, said), said
    assert "\n" not in said and len(said) < 1000, said
    assert answer["grown_mb"] < MAX_GROWN_MB


@pytest.mark.parametrize("name", VALID)
def test_the_same_checkpoint_unchanged_generates(
    name: str, child: Child, weights: Path, tmp_path: Path
) -> None:
    VALID[name](Files(weights, tmp_path))
    answer = child.open(tmp_path)
    assert answer.keys() == {"grown_mb"}, answer


def test_a_pickle_has_so_many_opcodes_and_bytes_at_most(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = weights / "small" / "state_dict.bin"
    for name, value in (("MAX_OPCODES", 300), ("MAX_PICKLE_BYTES", 2000), ("MAX_CALL_ENTRIES", 100)):
        with monkeypatch.context() as patch:
            patch.setattr(pickle_scan, name, value)
            with pytest.raises(WeightsError, match=f"more than {value}"):
                load_pickle(file)
    assert load_pickle(file)


EXTREMES = [
    None, True, "", "x", "${gone}", -1, 0, 1, 2, 7, 63, 1000, 10**7, 10**12, 10**60, -(10**9), 0.0, 1e-30,
    0.5, 1e30, float("nan"), float("inf"), [], [0], [1] * 100, [[]], {}, {"x": 1}, {"x": {"y": [1]}},
]  # fmt: skip


def paths(tree: Any, prefix: str = "") -> list[str]:
    """The dotted paths of every entry of a configuration, sections included."""
    own = [f"{prefix}{name}" for name in tree]
    for name, value in tree.items():
        if isinstance(value, dict):
            own += paths(value, f"{prefix}{name}.")
    return own


OTHER_FORMATS = {
    ("t5-small", "config.json", "small"): part_field_tables.T5,
    ("t5-small", "tokenizer_config.json", "small"): part_field_tables.TOKENIZER,
    ("encodec_32khz", "config.json", "hf-codec"): part_field_tables.TRANSFORMERS_ENCODEC,
}


def mutations() -> st.SearchStrategy[Make]:
    """Makers of a checkpoint of one format, of which one field has an extreme value or another type."""
    value = st.sampled_from(EXTREMES)
    lm = st.sampled_from(paths(tiny_models.lm_config("small")))
    followed = [p for p in paths(tiny_models.lm_config("melody")) if "self_wav" in p or "fuser" in p]
    melody = st.sampled_from(followed)
    codec = st.sampled_from(paths(tiny_codecs.codec_config()))

    others = [
        st.builds(partial(in_json, *file), st.sampled_from(sorted(table)), value)
        for file, table in OTHER_FORMATS.items()
    ]
    return st.one_of(
        st.builds(lm_field, lm, value),
        st.builds(lambda path, v: lm_field(path, v, "melody"), melody, value),
        st.builds(codec_field, codec, value),
        *others,
    )


def in_json(part: str, file: str, base: str, name: str, value: Any) -> Make:
    """A maker of a checkpoint of which one field of a JSON file is changed."""
    return json_fields(part, file, base, **{name: value})


@settings(max_examples=24, derandomize=True, deadline=None, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip
@given(make=mutations())
def test_a_configuration_with_any_field_changed_generates_or_is_refused(
    make: Make, child: Child, weights: Path
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        make(Files(weights, Path(folder)))
        answer = child.open(Path(folder))
    assert "raw" not in answer, answer["raw"]
    said = answer.get("error", "")
    assert "\n" not in said and len(said) < 1000, said
    assert answer["grown_mb"] < MAX_GROWN_MB
