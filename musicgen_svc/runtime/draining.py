"""Whether the server is about to stop, which another process tells by making a file."""

from pathlib import Path

from musicgen_svc.errors import DrainingError


class Drain:
    """The drain file of one service. While it exists, requests that do not run yet are refused."""

    def __init__(self, file: Path | None) -> None:
        """Removes a file that an earlier server left behind. None: the service is never drained."""
        self._file = file
        if file is not None:
            file.unlink(missing_ok=True)

    def check(self) -> None:
        """Raises if the server is about to stop; otherwise does nothing.

        Raises:
            DrainingError: it is.
        """
        if self._file is not None and self._file.exists():
            raise DrainingError
