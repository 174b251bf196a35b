"""Reads Cog's JSON log: makes readable lines of it, and follows the state of predictions and places."""

import asyncio
import contextlib
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TextIO

PREFIXES = re.compile(
    r"(worker setup failed( \(slot [0-9a-f-]+\))?|((async|sync) )?(prediction|setup) failed)\s*:\s*",
    re.IGNORECASE,
)
EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Exit): (?=.* )")

SAID_BETTER = ("Setup failed", "Worker initialization failed")
"""What Cog logs when set-up fails. It is not shown, because `scripts/serve` prints a sentence of its own."""
STARTED = "Starting prediction"
CANCELLING = ("Cancelling prediction", "Applying pending cancellation")
FINISHED = (
    "Prediction succeeded", "Prediction worker completed", "Prediction failed", "Prediction cancelled",
    "Slot dropped while InUse with non-terminal prediction",
)  # fmt: skip
LOST = (
    "PermitInUse dropped without state transition",
    "Slot poisoned - capacity permanently reduced",
    "Failed to transition slot to idle, poisoning slot",
)
"""What Cog 0.23.1 logs when one of its places, which it calls slots, will never run a prediction again."""


def sentence(error: str) -> str:
    """Finds the service's own sentence in an error of Cog's: the last line, without prefixes."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    text = lines[-1] if lines else "no reason was given."
    while prefix := PREFIXES.match(text):
        text = text[prefix.end() :]
    return text[found.end() :] if (found := EXCEPTION.match(text)) else text


class Console:
    """Writes to a terminal or a file. On a terminal each line of a progress bar replaces the one before."""

    def __init__(self, out: TextIO, as_json: bool) -> None:
        """Writes to `out`. If `as_json`, every line is a JSON object with the fields of Cog's own lines."""
        self._out = out
        self._as_json = as_json
        self._in_progress = False

    def say(self, text: str) -> None:
        """Writes a line of `scripts/serve`, with the time."""
        self._line(_as_json(text, "scripts/serve") if self._as_json else f"{datetime.now():%H:%M:%S} {text}")

    def show(self, line: str, record: dict[str, Any] | None) -> None:
        """Writes a line of Cog's log. `record`: the line as JSON. None: it is no JSON."""
        if self._as_json:
            self._line(_as_json(line, "cog") if record is None else _with_stage(line, record))
            return
        if record is None:
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
        with contextlib.suppress(OSError):  # a closed output must not stop the server
            self._in_progress = in_progress
            self._out.write(text)
            self._out.flush()


class CogLog:
    """The state of one Cog server, as far as its log tells it."""

    def __init__(
        self, console: Console, started: Callable[[str], None], cancelled: Callable[[str], None],
        finished: Callable[[str], None],
    ) -> None:  # fmt: skip
        """Makes the state of a server that has logged nothing.

        Args:
            console: shows the log.
            started: called with the id of each prediction that starts.
            cancelled: called with the id of each prediction that Cog cancels, or whose client hung up. Only a
                call of `finished` tells that it has ended.
            finished: called with the id of each prediction that has ended.
        """
        self._console = console
        self._started = started
        self._finished = finished
        self._cancelled = cancelled
        self.cancelled: set[str] = set()
        """Ids of predictions that run although Cog has cancelled them."""
        self.running: dict[str, bool] = {}
        """Id of each prediction that runs -> whether the service has logged anything for it."""
        self.idle = asyncio.Event()
        """Set while no prediction runs."""
        self.idle.set()
        self.lost: set[str] = set()
        """Cog's places that will never run a prediction again."""

    def line(self, line: str) -> None:
        """Reads one line of the log, and shows it."""
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
            self.cancelled.discard(prediction)
            if not self.running:
                self.idle.set()
            self._finished(prediction)
        elif message.startswith(CANCELLING):
            if prediction in self.running:
                self.cancelled.add(prediction)
                self._cancelled(prediction)
        elif prediction in self.running:  # a line that the service has logged
            self.running[prediction] = True


def _as_json(text: str, target: str) -> str:
    """Makes a line like Cog's own of a text. `target`: what has written it."""
    stamp = datetime.now(UTC).isoformat()
    return json.dumps({"timestamp": stamp, "level": "INFO", "fields": {"message": text}, "target": target})


def _with_stage(line: str, record: dict[str, Any]) -> str:
    """Returns a line of Cog's log. The stage that the service has logged as JSON is in `fields`."""
    fields = record["fields"]
    try:
        logged = json.loads(fields["message"])
        stage = {"stage": str(logged["stage"]), "seconds": float(logged["seconds"])}
    except (ValueError, KeyError, TypeError):
        return line
    message = f"{stage['stage']}: {stage['seconds']} s"
    return json.dumps(record | {"fields": fields | stage | {"message": message}})


def _record(line: str) -> dict[str, Any] | None:
    """Parses a line of Cog's log. None: it is no record of Cog's."""
    try:
        record = json.loads(line)
        datetime.fromisoformat(record["timestamp"])
        str(record["fields"]["message"])
    except (ValueError, KeyError, TypeError):
        return None
    assert isinstance(record, dict)
    return record
