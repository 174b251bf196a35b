"""With LOG_FORMAT=json every line is a JSON object, and the stages of a prediction are fields of theirs."""

import json
from pathlib import Path
from typing import Any

import pytest
from bodies import SHORT
from processes import needs_proc, wait_for
from replies import output
from server import BareCog, CogServer

STAGES = {"queue", "load", "condition", "generate", "decode", "write"}


def lines(server: CogServer) -> list[dict[str, Any]]:
    """All lines of a log, each of which must be a JSON object with the fields of Cog's own."""
    parsed = [json.loads(line) for line in server.log.splitlines()]
    assert all(line.keys() >= {"timestamp", "level", "fields", "target"} for line in parsed)
    return parsed


def settings(weights: Path) -> dict[str, str]:
    return {
        "COG_WEIGHTS": str(weights / "small"), "MUSICGEN_WEIGHTS_DIR": str(weights), "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def test_each_stage_is_a_line_with_its_prediction_and_seconds(weights: Path) -> None:
    with CogServer(LOG_FORMAT="json", **settings(weights)) as server:
        reply = server.predict(SHORT, id="one")
        server.predict(SHORT | {"model_version": "large"}, id="failing")
        wait_for(lambda: "Prediction failed" in server.log)
        assert server.stop() == 0
        logged = [line["fields"] for line in lines(server)]
    output(reply)
    stages = [fields for fields in logged if "stage" in fields and fields["prediction_id"] == "one"]
    assert {fields["stage"] for fields in stages} == STAGES
    for stage in STAGES:
        seconds = sum(fields["seconds"] for fields in stages if fields["stage"] == stage)
        assert seconds == pytest.approx(reply["metrics"][stage], abs=0.001)
    own = [line["fields"]["message"] for line in lines(server) if line["target"] == "scripts/serve"]
    assert any("Ready after" in message for message in own) and own[-1] == "Stopping ..."


@needs_proc
def test_in_an_image_the_message_of_cogs_line_is_the_stage(weights: Path) -> None:
    with BareCog(LOG_FORMAT="json", **settings(weights)) as server:
        output(server.predict(SHORT, id="one"))
        wait_for(lambda: '"write' in server.log.replace("\\", ""))
        server.stop()
        logged = [line["fields"] for line in lines(server) if line["fields"].get("prediction_id") == "one"]
    stages = [json.loads(fields["message"]) for fields in logged if '{"stage"' in fields["message"]]
    assert {stage["stage"] for stage in stages} == STAGES
    assert all(stage["seconds"] >= 0 for stage in stages)


def test_without_it_a_prediction_ends_with_one_readable_line(server: CogServer) -> None:
    reply = server.predict(SHORT)
    summary = [line for line in reply["logs"].splitlines() if line.startswith("seconds: ")]
    assert len(summary) == 1 and "generate" in summary[0] and "{" not in reply["logs"]
