"""Every error that the service raises on purpose. Its message is the sentence the user reads.

    ServiceError
    ├── InputError          a field's value cannot be used: names field, value and what is accepted
    │   └── AudioError      `input_audio` cannot be read
    ├── WeightsError        a checkpoint is absent, incomplete or does not fit
    └── GenerationError     the request was fine, the machine was not: memory, disk, time

`Stopped` is no error but a request's end by the client's own wish; it is never shown.
"""


class ServiceError(Exception):
    """Base of the errors whose message is meant for the user: one sentence, no traceback."""


class InputError(ServiceError):
    """A field, or a combination of fields, that the service cannot act on."""


class AudioError(InputError):
    """`input_audio` is not audio, is too long or too large, or selects nothing."""


class WeightsError(ServiceError):
    """Weights that are absent, incomplete, unsafe or of another architecture."""


class GenerationError(ServiceError):
    """The device, the disk or the clock ended a valid request."""


class Stopped(Exception):
    """The client cancelled or hung up. Raised out of progress callbacks to unwind a request."""


def first_line(exc: BaseException) -> str:
    """What a third party's error says, fit for a sentence of ours."""
    return (str(exc).strip() or type(exc).__name__).splitlines()[0]
