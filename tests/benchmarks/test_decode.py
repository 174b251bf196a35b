"""`scripts/bench` measures each implementation, reports what it compared, and fails if tokens differ."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import decode, launches, sides
from benchmarks.agreement import Agreement, likeliest
from benchmarks.report import Row
from benchmarks.workload import Workload
from musicgen_svc.engine import ragged
from musicgen_svc.engine.projections import Precision
from tests.fixtures.pretend_gpu import PretendGpu, pretend_gpu

Report = Callable[..., dict[str, Any]]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Report:
    """`bench(*options)` runs the command on a tiny model: -> its report, with the exit status as "status"."""
    monkeypatch.setattr(decode, "copy_bandwidth", lambda device: 10.0)

    def run(*options: str) -> dict[str, Any]:
        path = tmp_path / "report.json"
        monkeypatch.setattr(sys, "argv", ["bench", "--tiny", *options, "--json", str(path)])
        status = decode.main()
        return json.loads(path.read_text()) | {"status": status}

    return run


def test_a_report_has_every_pair_for_each_number_of_slots(
    bench: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    found = bench("--seconds", "0.4", "--slots", "1,2", "--engine-only")
    assert (found["status"], found["failed"]) == (0, [])
    assert [row["slots"] for row in found["rows"]] == [1, 2]
    for row in found["rows"]:
        pairs = zip(row["audiocraft_steps_per_s"], row["engine_steps_per_s"], row["ratio"], strict=True)
        for theirs, ours, ratio in pairs:
            assert ratio == pytest.approx(row["slots"] * ours / theirs) and theirs > 0
        assert len(row["ratio"]) == 3 and row["tokens"] == "equal"
        assert row["profile"] is None and row["growth"] is None  # there is no GPU, and the piece is too short
    assert "ratio min / median / max" in capsys.readouterr().out


def test_figures_are_printed_and_kept_before_anything_else_is_measured(
    bench: Report, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def look_closer(*_: object) -> None:
        raise KeyboardInterrupt  # the run is cut off here

    monkeypatch.setattr(decode, "look_closer", look_closer)
    with pytest.raises(KeyboardInterrupt):
        bench("--seconds", "0.2", "--slots", "1,2", "--pairs", "2", "--engine-only")
    lines = [line for line in capsys.readouterr().out.splitlines() if "steps/s" in line]
    assert [line.partition(":")[0] for line in lines] == ["small, 1 slot(s)", "small, 2 slot(s)"] * 2
    kept = json.loads((tmp_path / "report.json").read_text())
    assert [len(row["engine_steps_per_s"]) for row in kept["rows"]] == [2, 2]


def test_a_decode_that_records_a_graph_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    opposed, recorded = sides.Sides(*[None] * 4), iter([0, 6, 6, 6])
    runs = [1.0, 2.0, 3.0]
    monkeypatch.setattr(sides.Sides, "recordings", property(lambda self: next(recorded)))
    monkeypatch.setattr(sides.Sides, "_engine", lambda self, slots: ([], runs.pop(0), []))
    assert [opposed.engine(1)[1] for _ in range(2)] == [2.0, 3.0]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendGpu]:
    def profiled(run: Callable[[], object]) -> list[SimpleNamespace]:
        """Runs it, and shows two kernels and a launch, however many steps that are."""
        run()
        kernel, host = DeviceType.CUDA, DeviceType.CPU
        ranges = [SimpleNamespace(start=0, end=3), SimpleNamespace(start=3, end=4)]
        kernels = [SimpleNamespace(name="k", device_type=kernel, time_range=time) for time in ranges]
        return [*kernels, SimpleNamespace(name="cudaGraphLaunch", device_type=host)]

    with pretend_gpu(monkeypatch) as found:
        for name, value in (("get_device_name", "NVIDIA H200"), ("max_memory_allocated", 10**9)):
            monkeypatch.setattr(torch.cuda, name, lambda device=None, value=value: value)
        monkeypatch.setattr(launches, "profiled", profiled)
        monkeypatch.setattr(decode, "likeliest", lambda work: likeliest(work, 8))  # it is slow
        yield found


def test_on_a_gpu_each_kernel_has_a_line_and_agreement_is_measured(
    gpu: PretendGpu, bench: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--device", "cuda", "--seconds", "0.2", "--slots", "1,2", "--pairs", "1", "--engine-only")
    found = bench(*options, "--kernels", "off")
    assert (found["status"], found["device"], found["path"]) == (0, "NVIDIA H200", "plain")
    for row in found["rows"]:
        assert row["agreement"]["top1"] > 0.9 and row["tokens"] == "drawn otherwise"
        (kernel,) = row["profile"]["kernels"]
        assert (kernel["name"], kernel["us"], kernel["share"]) == ("k", 2, 1)
    assert "audiocraft_per_step" not in found
    shown = capsys.readouterr().out
    assert shown.count("     2.00 us x    0.1 = 100.0%  k") == 2
    assert shown.index("small, 2 slot(s): ") < shown.index("small, 1 slot(s), profiled: ")


def test_transformers_is_measured_in_the_same_pairs(
    bench: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = bench("--seconds", "0.2", "--pairs", "2", "--vs", "transformers", "--engine-only")["rows"]
    figures = zip(
        row["transformers_steps_per_s"], row["engine_steps_per_s"], row["ratio_to_transformers"], strict=True
    )
    for theirs, ours, ratio in figures:
        assert ratio == pytest.approx(ours / theirs) and theirs > 0
    assert len(row["ratio_to_transformers"]) == 2
    assert "ratio to transformers" in capsys.readouterr().out


def test_transformers_with_a_melody_model_is_refused(
    bench: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench("--model", "melody", "--vs", "transformers")
    assert "melody was given, a model with text alone is expected" in capsys.readouterr().err


def test_the_text_encoder_and_the_decoders_are_timed_too(bench: Report) -> None:
    found = bench("--seconds", "0.4", "--pairs", "1", "--mbd")["beside"]
    assert found.keys() == {"t5_s", "encodec_decode_s", "mbd_decode_s"}
    assert min(found.values()) > 0


@pytest.mark.parametrize("precision", ["reference", "float16"])
def test_tokens_that_differ_fail_the_command(
    precision: str, bench: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = ragged.draw
    monkeypatch.setattr(ragged, "draw", lambda *a: (draw(*a) + 1) % 2048)
    found = bench("--seconds", "0.4", "--pairs", "1", "--engine-only", "--precision", precision)
    assert found["status"] == 1
    assert [row["tokens"] for row in found["rows"]] == ["differ from frame 0"]
    assert "not audiocraft's: differ from frame 0" in found["failed"][0]


def test_each_precision_is_exact_or_reports_its_distance_from_the_reference(bench: Report) -> None:
    options = ("--seconds", "0.4", "--slots", "2", "--pairs", "1", "--engine-only", "--precision")
    found = {precision: bench(*options, precision) for precision in get_args(Precision)}
    assert all(report["status"] == 0 for report in found.values())
    assert "against_reference" not in found["reference"]
    assert found["float16"]["rows"][0]["tokens"] == "equal", "its weights are stored in float16"
    far = {name: found[name]["against_reference"] for name in ("float16", "bfloat16", "int8")}
    assert abs(far["float16"]["mean_kl_nats"]) < 1e-6 < far["bfloat16"]["mean_kl_nats"] < 0.01
    assert 1e-6 < far["int8"]["mean_kl_nats"] < 0.02
    assert far["float16"]["top1_agreement"] == 1 and far["int8"]["top1_agreement"] > 0.8


def test_a_figure_beyond_its_bound_fails_the_command(bench: Report) -> None:
    bounds = ("--at-least", "steps@2=1e9", "--at-least", "ratio=0", "--at-most", "real-time@1=1e-9")
    found = bench("--seconds", "0.2", "--slots", "1,2", "--pairs", "1", "--engine-only", *bounds)
    assert found["status"] == 1
    of_one, of_two = found["failed"]
    assert of_one.startswith("With 1 slot(s) the median of real-time is") and "at most 1e-09" in of_one
    assert of_two.startswith("With 2 slot(s) the median of steps is") and "at least 1e+09" in of_two


def test_a_figure_that_was_not_measured_meets_no_bound(bench: Report) -> None:
    found = bench("--seconds", "0.2", "--pairs", "1", "--engine-only", "--at-most", "growth=100")
    assert found["status"] == 1 and "growth is nan" in found["failed"][0]


@pytest.mark.parametrize("bound", ["steps@4=1", "stepps=1", "steps=fast"])
def test_a_bound_that_nothing_would_be_compared_with_is_refused(bound: str, bench: Report) -> None:
    with pytest.raises(SystemExit):
        bench("--seconds", "0.2", "--slots", "1,2", "--at-least", bound)


def test_audiocraft_may_decode_fewer_seconds(bench: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        Workload,
        "audiocraft",
        lambda self, whole=Workload.audiocraft: asked.append(self.frames) or whole(self),
    )
    found = bench("--seconds", "0.6", "--audiocraft-seconds", "0.3", "--engine-only")
    assert asked == [4, 15, 15, 15] and found["others_seconds"] == 0.3
    assert found["rows"][0]["tokens"] == "equal"


def test_too_little_agreement_fails_the_command() -> None:
    row = Row(1, audiocraft_steps_per_s=[1.0], engine_steps_per_s=[1.0], tokens="drawn otherwise")
    args = SimpleNamespace(precision="reference", at_least=[], at_most=[])
    for top1, sentences in ((0.97, 0), (0.5, 1)):
        row.agreement = Agreement(64, top1, 3)
        assert len(decode.failures([row], torch.device("cuda"), args)) == sentences
