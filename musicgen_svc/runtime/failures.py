"""What becomes of a request's error: a sentence for the client, and its cause for the log.

A prediction's own log lines are part of Cog's reply. A traceback names folders of the server, so it goes to
the server's log alone; both logs hold a number by which the operator finds one from the other.
"""

import contextvars
import sys
import traceback
import uuid

from musicgen_svc.errors import ServiceError, WeightsError


def log_failure(exc: Exception) -> None:
    """Prints an error with its causes into the server's log, and its number into the prediction's."""
    number = uuid.uuid4().hex[:8]
    print(f"failure {number}: the server's log has the cause")
    lines = "".join(traceback.format_exception(exc))
    # Cog tells by the context which prediction a line belongs to: to none, in a new one.
    contextvars.Context().run(print, f"failure {number}:\n{lines}", file=sys.stderr, flush=True)


def for_client(exc: ServiceError) -> ServiceError:
    """The error as the client may read it: the sentence that it has for that, and no cause."""
    return WeightsError(exc.for_client) if isinstance(exc, WeightsError) else exc.with_traceback(None)
