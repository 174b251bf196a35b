"""The player page in a real browser, with the real server and the demo model."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import Browser, browser, needs_chromium
from processes import wait_for
from server import CogServer

pytestmark = needs_chromium

RECORDING = """
window.played = [];
const start = AudioBufferSourceNode.prototype.start;
AudioBufferSourceNode.prototype.start = function (at) {
    const samples = this.buffer.getChannelData(0);
    window.context = this.context;
    window.played.push({at, now: this.context.currentTime, seconds: this.buffer.duration,
                        rate: this.buffer.sampleRate, samples: Array.from(samples),
                        state: document.body.dataset.state});
    return start.call(this, at);
};
const createObjectURL = URL.createObjectURL;
URL.createObjectURL = blob => createObjectURL(window.file = blob);
"""
"""Notes every buffer that the page plays, and the file that it offers."""


@pytest.fixture(scope="module")
def demo() -> Iterator[CogServer]:
    """A server of the demo model, which can be heard."""
    with CogServer(COG_MAX_CONCURRENCY="2", MUSICGEN_SLOTS="1", COG_WEIGHTS="") as running:
        assert running.health()["status"] == "READY", running.log
        yield running


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as running:
        yield running


def state(page: Browser) -> str:
    return str(page.run("document.body.dataset.state"))


def fill(page: Browser, prompt: str, duration: int) -> None:
    page.run(f"element('prompt').value = {prompt!r}; element('duration').value = {duration}")


def test_the_page_plays_while_the_music_is_generated_and_then_offers_the_file(
    demo: CogServer, chromium: Browser, tmp_path: Path
) -> None:
    chromium.open(f"{demo.url}/player", before=RECORDING)
    assert state(chromium) == "ready"
    fill(chromium, "jingle bells on a harp", 8)
    chromium.run("element('play').click()")
    chromium.wait_for("window.played.length > 0")
    chromium.wait_for("window.context.currentTime > window.played[0].at + 0.2")
    chromium.wait_for("document.body.dataset.state !== 'running'")
    assert (state(chromium), chromium.run("element('progress').value")) == ("done", 100)
    if folder := os.environ.get("SCREENSHOTS"):
        chromium.screenshot(Path(folder) / "player.png")

    played = chromium.run("window.played")
    assert played[0]["state"] == "running", "the first chunk is played before the request has ended"
    ends = [part["at"] + part["seconds"] for part in played]
    for before, part in zip(ends, played[1:], strict=False):
        assert part["at"] == pytest.approx(before, abs=1e-6) or part["at"] > before, "no two chunks overlap"
    heard = np.concatenate([part["samples"] for part in played])
    assert {part["rate"] for part in played} == {32_000} and len(heard) == 8 * 32_000
    assert np.sqrt(np.mean(heard**2)) > 0.01

    file = np.array(
        chromium.run(
            """window.file.arrayBuffer()
            .then(b => new OfflineAudioContext(1, 1, 32000).decodeAudioData(b))
            .then(b => Array.from(b.getChannelData(0)))"""
        )
    )
    assert np.corrcoef(heard, file)[0, 1] > 0.99, "it is the music of the file, at another level"
    assert chromium.run("element('result').hidden") is False
    chromium.wait_for("element('file').duration > 7.99 && element('file').duration < 8.01")


def test_stop_cancels_the_prediction(demo: CogServer, chromium: Browser) -> None:
    chromium.open(f"{demo.url}/player", before=RECORDING)
    fill(chromium, "a long waltz", 600)
    chromium.run("element('play').click()")
    chromium.wait_for("window.played.length > 0")
    chromium.run("element('stop').click()")
    chromium.wait_for("document.body.dataset.state === 'stopped'")
    wait_for(lambda: "canceled" in demo.log or "cancelled" in demo.log)
    assert demo.predict({"prompt": "a waltz", "duration": 1})["status"] == "succeeded"


def test_what_the_server_refuses_is_shown(demo: CogServer, chromium: Browser) -> None:
    chromium.open(f"{demo.url}/player", before=RECORDING)
    fill(chromium, " ", 4)
    chromium.run("element('play').click()")
    chromium.wait_for("document.body.dataset.state === 'failed'")
    assert "prompt" in chromium.run("element('status').textContent")
    fill(chromium, "x", 601)
    chromium.run("document.querySelector('form').noValidate = true; element('play').click()")
    chromium.wait_for("/duration/.test(element('status').textContent)")
    assert state(chromium) == "failed"


def test_every_control_has_a_name_and_the_page_loads_nothing_else(demo: CogServer, chromium: Browser) -> None:
    chromium.open(f"{demo.url}/player")
    assert chromium.run("performance.getEntriesByType('resource').map(e => e.name)") in (
        [],
        [f"{demo.url}/favicon.ico"],
    )
    tree = chromium.call("Accessibility.getFullAXTree")["nodes"]
    controls = [
        (node["role"]["value"], node["name"]["value"])
        for node in tree
        if not node["ignored"] and node["role"]["value"] in ("textbox", "spinbutton", "button", "progressbar")
    ]
    assert {role for role, _ in controls} == {"textbox", "spinbutton", "button", "progressbar"}
    assert all(name for _, name in controls), controls
