"""Fetches a checkpoint from a URL at set-up, once: over https, from hosts that the operator allows.

`url_cache.py` says which files a fetch makes before and after it is complete.
"""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import requests

from musicgen_svc.errors import DISK_FULL, WeightsError
from musicgen_svc.runtime.file_lock import locked
from musicgen_svc.weights.url_cache import CacheEntry, remove_leftovers
from musicgen_svc.weights.url_rules import Rules, is_page

_MAX_REDIRECTS = 5
_MAX_TRIES_WITHOUT_PROGRESS = 4
_TIMEOUT_S = (10, 60)  # for connecting, and between two pieces
_PIECE_BYTES = 1 << 20
_LOG_EVERY_S = 5.0


class _TemporaryError(Exception):
    """The connection broke, or the server has a fault that may be temporary."""


def fetch(url: str, cache: Path, rules: Rules, session: requests.Session | None = None) -> Path:
    """Fetches the file at a URL into `cache`, and returns its path there.

    A complete file from an earlier fetch is used if the server still has the same version, or cannot be
    reached.

    Raises:
        WeightsError: the rules forbid the URL, the server does not send the file, or the disk is full. A
            partial file then stays in a form that cannot be loaded, and the next call resumes it.
    """
    url = rules.check(url)
    if is_page(url):
        raise WeightsError(
            f"{rules.label(url)} is a page of a repository and no file: download the repository into "
            "weights/finetuned, or name one of its files, https://huggingface.co/<repository>/resolve/main/<file>."
        )
    try:
        cache.mkdir(parents=True, exist_ok=True)
        entry = CacheEntry.of(cache, url)
        remove_leftovers(cache, keep=entry)
        with locked(entry.lock) as held, session or requests.Session() as http:
            if not held:
                raise WeightsError(
                    f"{rules.label(url)} cannot be fetched to {cache}: its file system has no locks."
                )
            return _Fetch(url, entry, rules, http).run()
    except requests.RequestException:  # an OSError whose text has the URL
        raise WeightsError(f"{rules.label(url)} could not be fetched: start again to go on.") from None
    except OSError as exc:
        full = exc.errno in DISK_FULL
        reason = "the disk is full: make room there" if full else f"{exc.strerror}: check that folder"
        raise WeightsError(f"{rules.label(url)} cannot be kept in {cache}: {reason}.") from exc


class _Fetch:
    """The fetch of one file, over as many connections as are needed."""

    def __init__(self, url: str, entry: CacheEntry, rules: Rules, session: requests.Session) -> None:
        self._url, self._entry, self._rules, self._session = url, entry, rules, session
        self._name = rules.label(url)
        self._logged_s = time.monotonic()

    def run(self) -> Path:
        """The path of the complete file. Retries until several connections in a row bring no progress."""
        earlier = self._entry.complete_file()
        tries = 0
        while True:
            bytes_before = self._entry.partial_state()[0]
            try:
                with self._request(earlier[1] if earlier else "") as response:
                    if response.status_code == requests.codes.not_modified and earlier:
                        return earlier[0]
                    self._receive(response)
                path = self._entry.complete_partial()
            except _TemporaryError as exc:
                if earlier:
                    print(f"{self._name} cannot be reached ({exc}): the file of an earlier fetch is used")
                    return earlier[0]
                tries = 1 if self._entry.partial_state()[0] >= bytes_before + _PIECE_BYTES else tries + 1
                if tries >= _MAX_TRIES_WITHOUT_PROGRESS:
                    raise WeightsError(
                        f"{self._name} could not be fetched ({exc}): start again to go on."
                    ) from exc
                time.sleep(2 ** (tries - 1))
            else:
                print(f"{self._name} has arrived: sha256 {path.name}")
                return path

    def _request(self, earlier_etag: str) -> requests.Response:
        """The response, with its body not yet read, after redirects that are all allowed.

        Raises:
            WeightsError: a redirect is not allowed, or the server refuses the request.
            _TemporaryError: the server cannot be reached.
        """
        size, etag = self._entry.partial_state()
        headers = {"Accept-Encoding": "identity"}
        if earlier_etag:
            headers["If-None-Match"] = earlier_etag
        if size and etag:
            headers |= {"Range": f"bytes={size}-", "If-Range": etag}
        url = self._url
        for _ in range(_MAX_REDIRECTS + 1):
            try:
                response = self._session.get(
                    url, headers=headers, allow_redirects=False, stream=True, timeout=_TIMEOUT_S
                )
            except requests.RequestException as exc:
                raise _TemporaryError(_reason(exc)) from None  # its text has the URL
            except ValueError:  # requests parses the redirect's target itself
                raise WeightsError(f"{self._name} is redirected to what is not a URL.") from None
            if not response.is_redirect:
                return self._check_status(response)
            response.close()
            url = self._rules.check_redirect(url, response.headers["Location"])
        raise WeightsError(f"{self._name} is redirected more than {_MAX_REDIRECTS} times.")

    def _check_status(self, response: requests.Response) -> requests.Response:
        """The response, if its status is one of success.

        Raises:
            WeightsError: the server refuses the request.
            _TemporaryError: the server may accept it later.
        """
        status = response.status_code
        if status in (requests.codes.ok, requests.codes.partial_content, requests.codes.not_modified):
            return response
        response.close()
        if status == requests.codes.requested_range_not_satisfiable:
            self._entry.remove_partial()
        if status in (408, 416, 429) or status >= 500:
            raise _TemporaryError(f"the server answers {status}")
        raise WeightsError(f"{self._name} cannot be fetched: the server answers {status}.")

    def _receive(self, response: requests.Response) -> None:
        """Appends the body to the partial file; starts a new one if the server sends the whole file.

        Raises:
            WeightsError: the file is too large, or encoded.
            _TemporaryError: the body ends early, or continues another version of the file.
        """
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise WeightsError(f"{self._name} cannot be fetched: the server packs what it sends.")
        offset, etag = self._entry.partial_state()
        if response.status_code == requests.codes.ok:
            offset = 0
            self._entry.start_partial(_strong_etag(response.headers.get("ETag", "")))
        elif not (response.status_code == 206 and offset and _continues(response, offset, etag)):
            self._entry.remove_partial()
            raise _TemporaryError("the server continues with another file")
        total = _total_bytes(response, offset)
        self._check_size(total or offset, offset)
        with self._entry.partial.open("ab") as out:
            self._log(offset, total, first=True)
            for piece in self._pieces(response):
                offset += len(piece)
                if offset > self._rules.max_bytes:
                    self._check_size(offset, offset)
                self._write(out, piece, total, offset)
                self._log(offset, total)
            out.flush()
            os.fsync(out.fileno())
        if total is not None and offset != total:
            raise _TemporaryError(f"it ended after {offset} of {total} bytes")

    def _pieces(self, response: requests.Response) -> Iterator[bytes]:
        """The body, in pieces."""
        try:
            yield from response.iter_content(_PIECE_BYTES)
        except requests.RequestException as exc:
            raise _TemporaryError(_reason(exc)) from None  # its text has the URL

    def _write(self, out: IO[bytes], piece: bytes, total: int | None, offset: int) -> None:
        """Writes a piece. `total` and `offset` are the bytes of the whole file and of what has arrived."""
        try:
            out.write(piece)
        except OSError as exc:
            if exc.errno not in DISK_FULL:
                raise
            self._entry.remove_partial()
            size = f"{total:,} bytes" if total else f"more than {offset:,} bytes"
            raise WeightsError(
                f"{self._name} takes {size}, and the disk of {self._entry.cache} is full: make room there."
            ) from exc

    def _check_size(self, total: int, offset: int) -> None:
        """Checks the size of the whole file, of which `offset` bytes are on the disk.

        Raises:
            WeightsError: it is more than the rules allow, or the rest is more than the disk has left.
        """
        free = shutil.disk_usage(self._entry.cache).free
        if total > self._rules.max_bytes:
            fault = f"is larger than MUSICGEN_WEIGHTS_MAX_GB allows, {self._rules.max_bytes / 1e9:g} GB"
        elif total - offset > free:
            fault = (
                f"takes {total - offset:,} more bytes, and {self._entry.cache} has {free:,} left: "
                "make room there"
            )
        else:
            return
        self._entry.remove_partial()
        raise WeightsError(f"{self._name} {fault}.")

    def _log(self, done: int, total: int | None, first: bool = False) -> None:
        """Logs the progress in bytes, every few seconds and at the first call."""
        now_s = time.monotonic()
        if first or now_s - self._logged_s >= _LOG_EVERY_S:
            self._logged_s = now_s
            of = f" of {total / 1e6:,.0f}" if total else ""
            print(f"Fetching {self._name}: {done / 1e6:,.0f}{of} MB")


def _strong_etag(etag: str) -> str:
    """The ETag if it identifies the exact bytes; an empty text for a weak one, which does not."""
    return etag if etag.startswith('"') else ""


def _continues(response: requests.Response, offset: int, etag: str) -> bool:
    """Whether a partial response is the rest of the same version of the file."""
    content_range = response.headers.get("Content-Range", "")
    return content_range.startswith(f"bytes {offset}-") and response.headers.get("ETag") == etag


def _total_bytes(response: requests.Response, offset: int) -> int | None:
    """The bytes of the whole file, if the response has them. A partial response may not reach the end."""
    whole = response.headers.get("Content-Range", "").rpartition("/")[2]
    if response.status_code == requests.codes.partial_content and whole.isdecimal():
        return int(whole)
    length = response.headers.get("Content-Length", "")
    return offset + int(length) if length.isdecimal() else None


def _reason(exc: requests.RequestException) -> str:
    """What failed, as a clause without the URL."""
    if isinstance(exc, requests.Timeout):
        return "the server does not answer"
    if isinstance(exc, requests.exceptions.SSLError):
        return "its certificate is not trusted"
    broke = isinstance(exc, requests.exceptions.ChunkedEncodingError)
    return "the connection broke" if broke else "there is no connection"
