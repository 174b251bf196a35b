"""Cog's JSON log: readable lines for a terminal, and what it tells of predictions and places."""

import asyncio
import contextlib
import json
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any, TextIO

PREFIXES = re.compile(
    r"(worker setup failed( \(slot [0-9a-f-]+\))?|((async|sync) )?(prediction|setup) failed)\s*:\s*",
    re.IGNORECASE,
)
EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Exit): (?=.* )")

SAID_BETTER = ("Setup failed", "Worker initialization failed")
"""What Cog logs when set-up fails. `scripts/serve` says it in its own words."""
STARTED = "Starting prediction"
FINISHED = (
    "Prediction succeeded", "Prediction worker completed", "Prediction failed", "Prediction cancelled",
    "Slot dropped while InUse with non-terminal prediction",
)  # fmt: skip
LOST = (
    "PermitInUse dropped without state transition",
    "Slot poisoned - capacity permanently reduced",
    "Failed to transition slot to idle, poisoning slot",
)
"""What Cog 0.23.1 logs when one of its places will never take a prediction again."""


def sentence(error: str) -> str:
    """The service's own words in an error of Cog's: the last line, without Cog's and Python's prefixes."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    text = lines[-1] if lines else "no reason was given."
    while prefix := PREFIXES.match(text):
        text = text[prefix.end() :]
    return text[found.end() :] if (found := EXCEPTION.match(text)) else text


class Console:
    """Writes to a terminal or a file; the lines of progress bars replace each other on a terminal."""

    def __init__(self, out: TextIO, raw: bool) -> None:
        """`raw`: Cog's JSON lines are written as they are."""
        self._out = out
        self._raw = raw
        self._in_progress = False

    def say(self, text: str) -> None:
        """Writes a line of our own, with the time."""
        self._line(f"{datetime.now():%H:%M:%S} {text}")

    def show(self, line: str, record: dict[str, Any] | None) -> None:
        """Writes a line of Cog's log. Without a record it is no JSON, such as a traceback of Python."""
        if record is None or self._raw:
            self._line(line)
            return
        fields = record["fields"]
        message = str(fields["message"])
        if message in SAID_BETTER:
            return
        if "error" in fields:
            message += f": {sentence(str(fields['error']))}"
        prediction = fields.get("prediction_id")
        stamp = datetime.fromisoformat(record["timestamp"]).astimezone()
        text = f"{stamp:%H:%M:%S} {f'[{prediction}] ' if prediction else ''}{message}"
        if "%|" in message and self._out.isatty():
            self._write(f"\r{text}\033[K", in_progress=True)
        else:
            self._line(text)

    def _line(self, text: str) -> None:
        self._write(("\n" if self._in_progress else "") + text + "\n", in_progress=False)

    def _write(self, text: str, in_progress: bool) -> None:
        with contextlib.suppress(OSError):  # nobody reads the output: that must not stop the server
            self._in_progress = in_progress
            self._out.write(text)
            self._out.flush()


class CogLog:
    """What one Cog server has logged so far."""

    def __init__(
        self, console: Console, started: Callable[[str], None], finished: Callable[[str], None]
    ) -> None:
        """`started` and `finished`: called with the id of each prediction."""
        self._console = console
        self._started = started
        self._finished = finished
        self.running: dict[str, bool] = {}
        """Ids of the predictions that Cog has started and not ended, and whether the service has begun."""
        self.idle = asyncio.Event()
        """Set while there are none."""
        self.idle.set()
        self.lost: set[str] = set()
        """Places that will never take a prediction again."""

    def line(self, line: str) -> None:
        """Takes in one line of the log, and shows it."""
        record = _record(line)
        self._console.show(line, record)
        if record is None:
            return
        fields = record["fields"]
        message, prediction = str(fields["message"]), fields.get("prediction_id")
        if message.startswith(LOST):
            self.lost.add(str(fields.get("slot")))
        if not prediction:
            return
        if message == STARTED:
            self.running[prediction] = False
            self.idle.clear()
            self._started(prediction)
        elif message in FINISHED:
            self.running.pop(prediction, None)
            if not self.running:
                self.idle.set()
            self._finished(prediction)
        elif prediction in self.running:  # a line of the service's own
            self.running[prediction] = True


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
        datetime.fromisoformat(record["timestamp"])
        str(record["fields"]["message"])
    except (ValueError, KeyError, TypeError):
        return None
    assert isinstance(record, dict)
    return record
