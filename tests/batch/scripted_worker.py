"""A worker process that does what the prompts say, for tests of the fleet: it loads nothing.

A prompt is `make`, `die` (always), `die once`, or `wait` (until another such row was sent). The model
`broken` ends the process whenever it is to be loaded, and `large` does not load. A row is unchanged if the
known hash of its model is `same`. The model `patient` loads when two processes have started. Every process
appends what it is sent to a file.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

Json = dict[str, Any]


def main(folder: Path) -> None:
    """Serves until standard input ends. `folder`: the fleet's folder for unfinished files."""
    waiting: list[Json] = []
    (folder / f"started {os.getpid()}").touch()
    if not sys.stdin.readline():
        return
    for text in sys.stdin:
        message = json.loads(text)
        with (folder / "sent").open("a") as log:
            log.write(json.dumps({"pid": os.getpid(), **message}) + "\n")
        if "check" in message:
            unchanged = message["check"]["known"]["model_sha256"] == "same"
            answer({"id": message["check"]["id"], "unchanged": unchanged})
            continue
        if "prepare" in message:
            if message["prepare"] == "broken":
                os._exit(1)
            while message["prepare"] == "patient" and len(list(folder.glob("started *"))) < 2:
                time.sleep(0.01)
            numbers = {"device": "cpu", "threads": 3, "rows": 2, "workers": 2}
            answer({"capacity": None if message["prepare"] == "large" else numbers})
            continue
        row = message["row"]
        prompt, once = row["fields"]["prompt"], folder / f"{row['id']} died"
        if prompt == "die" or (prompt == "die once" and not once.exists()):
            once.touch()
            os._exit(1)
        if prompt == "wait":
            waiting.append(row)
            if len(waiting) < 2:
                continue
        for ready in waiting if prompt == "wait" else [row]:
            answer({"id": ready["id"], "outcome": {"error": None, "file": None}})
        waiting = [] if prompt == "wait" else waiting


def answer(message: Json) -> None:
    """Writes one message."""
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
