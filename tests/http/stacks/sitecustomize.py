"""Makes each Python process of a server under test write its threads' stacks to a file on SIGUSR1."""

import faulthandler
import os
import signal
from pathlib import Path

if folder := os.environ.get("STACKS_FOLDER"):
    # Not to stderr, because Cog reads the worker's stderr and may itself be the process that hangs.
    file = Path(folder, str(os.getpid())).open("w")  # noqa: SIM115 (the handler needs it open)
    faulthandler.register(signal.SIGUSR1, file)
