"""Every error that the service raises on purpose. Its message is the sentence the user reads.

    ServiceError
    ├── InputError          a field's value cannot be used: names field, value and what is accepted
    │   └── AudioError      `input_audio` cannot be read
    ├── WeightsError        a checkpoint is absent, incomplete or does not fit
    │   └── DamagedFileError   a file of it is damaged, truncated, or something else under its name
    └── GenerationError     the request was fine, the machine was not: memory, disk, time

`Stopped` is no error but a request's end by the client's own wish; it is never shown.
"""

from pathlib import Path


class ServiceError(Exception):
    """Base of the errors whose message is meant for the user: one sentence, no traceback."""

    @property
    def for_client(self) -> str:
        """The sentence for whoever sent the request. The message itself is the operator's and the log's."""
        return str(self)


class InputError(ServiceError):
    """A field, or a combination of fields, that the service cannot act on."""


class AudioError(InputError):
    """`input_audio` is not audio, is too long or too large, or selects nothing."""


class WeightsError(ServiceError):
    """Weights that are absent, incomplete, unsafe or of another architecture.

    Its message may name folders of the server, which are no client's business. A client reads a sentence of
    its own, if the error has one, or else only that the log has the cause.
    """

    def __init__(self, message: str, for_client: str | None = None) -> None:
        super().__init__(message)
        self._for_client = (
            for_client or "This request needs weights that cannot be used; the server's log says why."
        )

    @property
    def for_client(self) -> str:
        return self._for_client

    def renamed(self, folder: Path, name: Path) -> "WeightsError":
        """The same error, with a folder called by another name: by that of the archive that it came from."""
        message = str(self).replace(str(folder), str(name))
        return type(self)(message, self._for_client.replace(folder.name, name.name))


class DamagedFileError(WeightsError):
    """A file of a checkpoint that is damaged, truncated, or something else under the file's name."""


class GenerationError(ServiceError):
    """The device, the disk or the clock ended a valid request."""


class Stopped(Exception):
    """The client cancelled or hung up. Raised out of progress callbacks to unwind a request."""


def first_line(exc: BaseException) -> str:
    """What a third party's error says, fit for a sentence of ours."""
    return (str(exc).strip() or type(exc).__name__).splitlines()[0]
