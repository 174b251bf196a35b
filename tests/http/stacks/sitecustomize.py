"""On the path of every Python that a server under test consists of: SIGUSR1 writes down its stacks."""

import faulthandler
import os
import signal
from pathlib import Path

if folder := os.environ.get("STACKS_FOLDER"):
    # A file of its own: Cog reads what the worker writes to stderr, and a worker that hangs may be why.
    file = Path(folder, str(os.getpid())).open("w")  # noqa: SIM115 (the handler needs it as long as it lives)
    faulthandler.register(signal.SIGUSR1, file)
