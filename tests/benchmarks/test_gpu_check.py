"""`scripts/gpu_check` runs every row that it can, keeps what was measured, and knows what a machine needs."""

import fcntl
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import decode, demo, gates, gpu_check, latency
from benchmarks.bounds import Bound
from benchmarks.gpu_check import Row, Rows
from benchmarks.random_models import SIZES

ROOT = Path(__file__).parents[2]
WRITE = "import sys, pathlib; pathlib.Path(sys.argv[-1]).write_text('figures'); "
Check = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Check:
    """`check(a="code", ...)` runs rows of these names and programs: -> the exit status and the lines."""

    def run(**programs: str) -> tuple[int, list[str]]:
        rows = [Row(name, 60, ("-c", program)) for name, program in programs.items()]
        monkeypatch.setattr(Rows, "quick", lambda self: rows)
        monkeypatch.setattr(sys, "argv", ["", "quick", "--device", "cpu", "--folder", str(tmp_path / "rows")])
        status = gpu_check.main()
        return status, capfd.readouterr().out.splitlines()

    monkeypatch.setattr(gpu_check.signal, "signal", lambda *_: None)  # pytest keeps its own
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return run


def names(folder: Path) -> list[str]:
    """Names of the files in a folder."""
    return sorted(path.name for path in folder.iterdir())


def test_a_row_that_failed_is_run_again_and_stops_no_other(check: Check, tmp_path: Path) -> None:
    status, lines = check(a=WRITE, b=WRITE + "sys.exit(3)", c="sys.exit(1)", d=WRITE)
    assert status == 1 and lines[-1] == "Failed: b c"
    assert any(line.startswith("--- b: it ended with status 3") for line in lines)
    assert names(tmp_path / "rows") == ["a.json", "b.failed.json", "d.json"]  # what b has measured is kept

    status, lines = check(a="raise SystemExit(1)", b=WRITE, c="pass", d="raise SystemExit(1)")
    assert status == 1 and lines[-1] == "Failed: c"
    assert any(line.startswith("--- c: it wrote no file") for line in lines)
    assert names(tmp_path / "rows") == ["a.json", "b.json", "d.json"]

    status, lines = check(a="raise SystemExit(1)", b="raise SystemExit(1)", c=WRITE, d="raise SystemExit(1)")
    assert status == 0 and lines[-1] == f"Every row is in {tmp_path / 'rows'}."


def test_a_row_without_time_is_stopped_with_its_children(
    check: Check, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    alive = tmp_path / "alive"
    alive.touch()
    child = (
        f"import fcntl, time; f = open({str(alive)!r}); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); "
    )
    program = (
        "import subprocess, time; "
        f"command = [sys.executable, '-c', {child + 'time.sleep(600)'!r}]; "
        "child = subprocess.Popen(command, stdout=subprocess.PIPE); "
        "child.stdout.read(1); pathlib.Path(sys.argv[-1]).write_text('figures'); time.sleep(600)"
    )
    wait = subprocess.Popen.wait

    def over_once_it_has_written(self: Any, timeout: float | None = None) -> int:
        if timeout == 60:
            while not (tmp_path / "rows" / "a.json.part").exists():
                assert self.poll() is None
            raise subprocess.TimeoutExpired("a", timeout)
        return wait(self, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", over_once_it_has_written)
    status, lines = check(a="import sys, pathlib; " + program)
    assert status == 1 and any(line.startswith("--- a: its time was over") for line in lines)
    assert names(tmp_path / "rows") == ["a.failed.json"]
    with alive.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the child has ended: this would wait for it for ever


def test_no_row_begins_after_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not gpu_check.run(Row("a", 60, ("-c", WRITE)), tmp_path, end_s=0.0)
    assert "a: no time was left" in capsys.readouterr().out and names(tmp_path) == []


def test_without_a_gpu_the_script_fails_before_any_row(tmp_path: Path) -> None:
    ended = subprocess.run(
        [ROOT / "scripts" / "gpu_check", "quick", "--folder", tmp_path / "rows"],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert ended.returncode == 1 and ended.stderr.endswith("No GPU can be used here.\n")
    assert not (tmp_path / "rows").exists()


# --- rows and gates -----------------------------------------------------------------------------


def module_and_words(row: Row) -> tuple[str, list[str]]:
    """The module of a row, and the arguments that it gets."""
    assert row.command[0] == "-m"
    return row.command[1], [*row.command[2:], f"{row.name}.json"]


@pytest.mark.parametrize("rate", [1.0, 0.7])
def test_the_benchmarks_accept_the_options_of_every_row(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows("cuda", rate)
    parsers = {
        f"benchmarks.{module.__name__.rpartition('.')[2]}": module for module in (decode, demo, latency)
    }
    seen = set()
    for row in (*rows.quick(), *rows.rest()):
        module, words = module_and_words(row)
        monkeypatch.setattr(sys, "argv", ["", *words])
        args = parsers[module].arguments()
        assert args.json.name == f"{row.name}.json"
        if module == "benchmarks.decode":
            assert (args.seconds, args.device, args.tiny) == (30, "cuda", False)
            seen |= {(args.model, n, args.precision, args.graphs, args.kernels) for n in args.slots}
    usual = {("reference", "auto", "auto")}
    assert {(model, n) for model, n, *how in seen if {tuple(how)} == usual} == {
        *itertools.product(SIZES, (1, 16)), *itertools.product(("small", "large"), (2, 4, 8)),
    }  # fmt: skip
    assert {"int8"} <= {how[2] for how in seen}
    assert {how[3:] for how in seen} == {("auto", "auto"), ("off", "auto"), ("auto", "off")}
    assert len({row.name for row in (*rows.quick(), *rows.rest())}) == 15


def test_every_gate_is_in_a_row_scaled_by_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for device, factor in (("NVIDIA H200", 1.0), ("NVIDIA H100 80GB HBM3", 0.7)):
        rate = gates.rate(device)
        assert rate == factor
        rows = {row.name: row.command for row in (*Rows("cuda", rate).quick(), *Rows("cuda", rate).rest())}
        for model, gate in gates.GATES.items():
            for option, bound in (
                ("--at-least", Bound("steps", gate.steps * factor, "1")),
                ("--at-least", Bound("real-time", gate.real_time * factor, "16")),
                ("--at-least", Bound("ratio", 10, "1")),
                ("--at-most", Bound("growth", gate.growth, "1")),
            ):
                assert (option, bound.option()) in itertools.pairwise(rows[model])
            for seconds, most_s in gate.latency_s.items():
                bound = Bound("seconds", most_s / factor, str(seconds))
                assert ("--at-most", bound.option()) in itertools.pairwise(rows[f"latency-{model}"])
            assert ("--at-most", "first@8=1.2") in itertools.pairwise(rows[f"latency-{model}"])
        assert f"steps@1={400 * factor:g}" in rows["small-no-kernels"]


def test_other_gpus_and_a_cpu_have_no_gates_of_speed() -> None:
    assert gates.rate("NVIDIA GH200 480GB") is gates.rate("Tesla T4") is None
    for row in (*Rows("cuda", None).quick(), *Rows("cpu", None).rest()):
        assert [word for word in row.command if "@" in word] == (
            ["song@text=22"] if row.name == "songs" else []
        )


@pytest.mark.parametrize("name", ["small", "melody", "small-int8", "small-beside"])
def test_a_row_of_decoding_runs_on_a_cpu(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(decode, "copy_bandwidth", lambda device: 10.0)
    rows = Rows("cpu", None)
    row = next(row for row in (*rows.quick(), *rows.rest()) if row.name == name)
    file = tmp_path / "row.json"
    monkeypatch.setattr(sys, "argv", ["", *row.command[2:], str(file)])
    assert decode.main() == 0
    found = json.loads(file.read_text())
    assert found["rows"][0]["tokens"] == "equal" or name == "small-int8"
    assert {"commit", "cpu", "device", "driver", "python", "torch", "triton"} <= found.keys()


def test_the_tests_that_need_a_gpu_are_found() -> None:
    (row,) = Rows("cuda", 1.0).tests()
    files = {word for word in row.command if word.endswith(".py")}
    assert {"tests/engine/test_static.py", "tests/benchmarks/test_measures.py"} <= files
    assert all((ROOT / file).is_file() for file in files) and row.suffix == ".xml"
