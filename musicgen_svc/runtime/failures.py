"""Turns a request's error into a sentence for the client and an entry in the server's log.

A prediction's own log lines are part of Cog's reply. A traceback names folders of the server, so it goes only
to the server's log. Both logs hold the same number, by which the operator finds the traceback.
"""

import contextvars
import sys
import traceback
import uuid

from musicgen_svc.errors import ServiceError, WeightsError


def log_failure(exc: Exception) -> None:
    """Prints an error with its causes to the server's log, and its number to the prediction's log."""
    number = uuid.uuid4().hex[:8]
    print(f"failure {number}: the server's log has the cause")
    lines = "".join(traceback.format_exception(exc))
    # Cog assigns lines to predictions by their context variables; a new context belongs to no prediction.
    contextvars.Context().run(print, f"failure {number}:\n{lines}", file=sys.stderr, flush=True)


def for_client(exc: ServiceError) -> ServiceError:
    """Returns the error that the client may read: the sentence meant for clients, without a cause."""
    return WeightsError(exc.for_client) if isinstance(exc, WeightsError) else exc.with_traceback(None)
