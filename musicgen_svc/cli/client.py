"""A client of a Cog server, which turns each answer into a result or into one sentence.

Cog has no route for the progress of a prediction. But if a prediction runs, Cog answers a PUT to its id with
its state, before it looks at the body. If it does not run, Cog checks the body before it starts anything. The
client therefore asks for progress with a PUT whose body is never valid, which cannot start a prediction.
"""

import contextlib
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import requests

from musicgen_svc.cli.cog_log import sentence
from musicgen_svc.cli.schema_fields import impossible_input
from musicgen_svc.runtime.json_object import Json

OnProgress = Callable[[int, str], None]
"""Called with the percentage reached and the name of the stage."""

CONNECT_S = 10.0
BUSY_FIRST_S, BUSY_LAST_S = 1.0, 15.0
"""How long to wait before asking a busy server again: the first value, doubled each time up to the second."""
PROGRESS_S = 0.3
"""How often progress is asked for."""
CANCEL_S, CANCEL_AGAIN_S = 10.0, 0.1
"""How long a cancel is repeated, and how often."""

OURS = re.compile(r"(Service|Input|Audio|Weights|Generation)Error: ")
"""The service's own errors, of musicgen_svc/errors.py. Their sentence holds the cause."""
IN_LOG = re.compile(r"its log has the cause|worker (crashed|died|exited)", re.IGNORECASE)
"""Errors whose cause only the server's log holds."""
BAR = re.compile(r"(\d{1,3})%\|[^|]*\|[ ]*([a-z][a-z-]*)?")
"""A progress bar of tqdm: its percentage and the name of the stage."""


class FailedError(Exception):
    """The prediction, the server or the network failed. The message is one sentence for the user."""

    def __init__(self, text: str, in_log: bool = False) -> None:
        """Makes an error.

        Args:
            text: the sentence.
            in_log: whether only the server's log can hold the cause.
        """
        super().__init__(text)
        self.in_log = in_log


def progress(logs: str) -> tuple[int, str]:
    """Finds the last percentage and stage that a progress bar in a prediction's log shows."""
    *_, last = (0, ""), *((min(int(percent), 100), stage) for percent, stage in BAR.findall(logs))
    return last


class Client:
    """A client of the Cog server at `url`. Every method raises FailedError if there is no answer."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.direct = re.match(r"(?i)https?://(localhost|127\.|\[::1\])", self.url) is not None
        """Whether no proxy may be used, because none can reach this machine's loopback device."""

    def call(self, method: str, path: str, body: Json | None = None, timeout_s: float | None = 10.0) -> Any:
        """Sends a request, and returns the response whatever its status is."""
        with self.session() as session:
            return session.request(method, self.url + path, json=body, timeout=(CONNECT_S, timeout_s))

    @contextlib.contextmanager
    def session(self) -> Iterator[requests.Session]:
        """Context manager of an HTTP session, in which an answer that does not come is a FailedError."""
        try:
            with requests.Session() as session:
                session.trust_env = not self.direct
                yield session
        except requests.RequestException as error:
            raise FailedError(
                f"The server at {self.url} does not answer: {cause(error)}.", in_log=True
            ) from None

    @contextlib.contextmanager
    def cancelling(self, path: str, ended: Callable[[int], bool]) -> Iterator[None]:
        """Context manager in which an interrupt, or any error but a FailedError, cancels a prediction.

        The cancel is repeated until the prediction has ended, because Cog ignores one that arrives while the
        prediction starts. If that takes too long, the error gets a note that the prediction may still run.

        Args:
            path: of the prediction.
            ended: whether it has ended, given the HTTP status of the last cancel; 0: there is none.
        """
        try:
            yield
        except FailedError:
            raise
        except BaseException as error:
            deadline_s, status = time.monotonic() + CANCEL_S, 0
            while not ended(status):
                if time.monotonic() >= deadline_s:
                    error.add_note(f"The server did not say that it has cancelled {path}: it may still run.")
                    break
                with contextlib.suppress(FailedError):
                    status = self.call("POST", f"{path}/cancel", {}, timeout_s=2.0).status_code
                time.sleep(CANCEL_AGAIN_S)
            raise

    def health(self) -> Json:
        """Returns the health check's answer."""
        answer = _json(self.call("GET", "/health-check"))
        if "status" not in answer:
            raise FailedError(f"What answers at {self.url} is not a Cog server.")
        return answer

    def schema(self) -> Json | None:
        """Returns the schema. None: the server has none, and so does not check inputs."""
        answer = self.call("GET", "/openapi.json")
        return _json(answer) if answer.ok else None

    def await_ready(self, on_wait: Callable[[], None] = lambda: None) -> None:
        """Waits until the server is set up. It may be busy then.

        Args:
            on_wait: called again and again while waiting.

        Raises:
            FailedError: set-up failed, or the worker died.
        """
        while (health := self.health())["status"] not in ("READY", "BUSY"):
            if health["status"] == "SETUP_FAILED":
                logs = health.get("setup", {}).get("logs", "")
                raise FailedError(f"Setup failed: {sentence(logs)}", in_log=not OURS.search(logs))
            if health["status"] in ("DEFUNCT", "UNHEALTHY"):
                raise FailedError(f"The server says that it is {health['status']}: restart it.", in_log=True)
            on_wait()
            time.sleep(0.1)

    def predict(
        self, values: Json, schema: Json | None, on_progress: OnProgress, on_busy: Callable[[], None]
    ) -> Json:
        """Runs one prediction. If this is interrupted by an exception, the prediction is cancelled.

        Args:
            values: the request's input.
            schema: of the server.
            on_progress: called while the prediction runs.
            on_busy: called each time that the server is busy, before waiting.

        Returns:
            dict: Cog's reply, with `output` and `metrics`.

        Raises:
            FailedError: the prediction did not succeed.
        """
        return result(self.until_not_busy(lambda: self._run(values, schema, on_progress), on_busy))

    def until_not_busy(self, send: Callable[[], Any], on_busy: Callable[[], None]) -> Any:
        """Sends a request again and again until it is not answered with 409.

        Args:
            send: sends the request, and returns the response.
            on_busy: called each time that the server is busy, before waiting.

        Returns:
            What `send` returned last.
        """
        wait_s = BUSY_FIRST_S
        while (response := send()).status_code == 409:
            self.await_ready()  # raises if the worker died, because Cog then answers 409 for ever
            on_busy()
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, BUSY_LAST_S)
        return response

    def _run(self, values: Json, schema: Json | None, on_progress: OnProgress) -> Any:
        """Sends the request from a thread and follows it in this one. An exception here cancels it."""
        path = f"/predictions/{uuid.uuid4().hex[:16]}"
        answers: list[Any] = []

        def send() -> None:
            try:
                answers.append(self.call("PUT", path, {"input": values}, timeout_s=None))
            except FailedError as error:
                answers.append(error)

        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        with self.cancelling(path, lambda status: not sender.is_alive()):
            self._follow(sender, path, impossible_input(schema), on_progress)
        if isinstance(answers[0], FailedError):
            raise answers[0]
        return answers[0]

    def _follow(
        self, sender: threading.Thread, path: str, question: Json | None, on_progress: OnProgress
    ) -> None:
        """Reports progress until the request is answered. A failed poll is ignored."""
        reached, pause_until_s = (0, ""), 0.0
        while True:
            sender.join(PROGRESS_S)
            if not sender.is_alive():
                return
            start_s = time.monotonic()
            if question and start_s > pause_until_s:
                with contextlib.suppress(FailedError):
                    state = self.call("PUT", path, {"input": question})
                    if state.status_code == 202:
                        reached = progress(_json(state).get("logs") or "")
                # The state repeats the inputs, so that each poll is expensive if they hold a large file.
                pause_until_s = start_s + 5 * (time.monotonic() - start_s)
            on_progress(*reached)


def _json(response: Any) -> Json:
    """Reads an answer that must be a JSON object."""
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise FailedError(f"The server answered {response.status_code} {response.reason} without JSON.")
    return answer


def result(response: Any) -> Json:
    """Returns the reply of a prediction that succeeded.

    Raises:
        FailedError: with the service's sentence, or with Cog's if Cog refused the request.
    """
    if response.status_code == 413:
        raise FailedError("The request is larger than the server takes: give input_audio as an http(s) URL.")
    answer = _json(response)
    if response.status_code == 422 and isinstance(answer.get("detail"), list):
        raise FailedError(
            "; ".join(f"{entry['loc'][-1]}: {entry['msg']}" for entry in answer["detail"]) + "."
        )
    if not response.ok and answer.get("status") != "canceled":
        answer = {"error": f"The server answered {response.status_code}."} | answer | {"status": "failed"}
    return succeeded(answer)


def succeeded(reply: Json) -> Json:
    """Returns a reply whose prediction succeeded with an output.

    Raises:
        FailedError: it did not; with the sentence in the reply.
    """
    if reply.get("status") == "canceled":
        raise FailedError("The prediction was cancelled.")
    if reply.get("status") != "succeeded":
        text = sentence(str(reply.get("error") or "The prediction failed without a reason."))
        raise FailedError(text, in_log=IN_LOG.search(text) is not None)
    if not isinstance(reply.get("output"), str):
        raise FailedError("The prediction succeeded and returned no file.")
    return reply


def cause(error: BaseException) -> str:
    """The text of the innermost cause, which is the most specific one."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
