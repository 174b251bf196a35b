"""All errors that the service raises on purpose. The message of each is the sentence that the user reads.

    ServiceError
    ├── InputError             a field's value cannot be used; names the field, the value and what is accepted
    │   └── AudioError         `input_audio` cannot be read
    ├── WeightsError           a checkpoint is missing, incomplete or does not fit
    │   └── DamagedFileError   a file of a checkpoint is damaged, truncated or of another type than its name
    ├── GenerationError        the request is valid, but memory, disk space or time is used up
    └── DrainingError          the request is valid, but the server is about to stop

`Stopped` is not a ServiceError: it ends a request that the client cancelled, and nobody reads it.
"""

import errno
from pathlib import Path

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Numbers of an `OSError` that mean that a file cannot grow: the disk, a quota or a limit of the process."""


class ServiceError(Exception):
    """Base class of the errors that a user reads: one sentence, no traceback."""

    @property
    def for_client(self) -> str:
        """The sentence for the client. The message itself is for the operator and the log."""
        return str(self)


class InputError(ServiceError):
    """A field, or a combination of fields, has a value that the service does not accept."""


class AudioError(InputError):
    """`input_audio` is not audio or is too long or too large, or the selected part of it is empty."""


class WeightsError(ServiceError):
    """Weights are missing, incomplete, unsafe or of another architecture.

    The message may name folders of the server, which a client must not learn. So a client reads another
    sentence: `for_client` if it is given, else one that refers to the log.
    """

    def __init__(self, message: str, for_client: str | None = None) -> None:
        super().__init__(message)
        self._for_client = (
            for_client or "This request needs weights that cannot be used; the server's log says why."
        )

    @property
    def for_client(self) -> str:
        """The sentence for the client, which names no folder of the server."""
        return self._for_client

    def renamed(self, folder: Path, name: Path) -> "WeightsError":
        """Returns a copy of the error that names `name` instead of `folder`.

        For a folder of unpacked files, which the user knows only as the archive.
        """
        message = str(self).replace(str(folder), str(name))
        return type(self)(message, self._for_client.replace(folder.name, name.name))


class DamagedFileError(WeightsError):
    """A file of a checkpoint is damaged, truncated or of another type than its name."""


class GenerationError(ServiceError):
    """The device, the disk or the time limit ended a valid request."""


class DrainingError(ServiceError):
    """The server is about to stop, and the request has not begun."""

    def __init__(self) -> None:
        super().__init__("The server is shutting down: send the request again later, or to another server.")


class Stopped(Exception):
    """The client cancelled or disconnected. Raised by progress callbacks to unwind the request."""


def first_line(exc: BaseException) -> str:
    """Returns the first line of an error's message, or the name of its class if it has no message."""
    return (str(exc).strip() or type(exc).__name__).splitlines()[0]
