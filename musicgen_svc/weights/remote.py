"""A checkpoint from a URL, fetched at set-up: over https, from hosts that the operator allows, once.

Where it lies until it has arrived, and afterwards, is in fetched.py.
"""

import errno
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import requests

from musicgen_svc.errors import WeightsError
from musicgen_svc.runtime.file_lock import locked
from musicgen_svc.weights.fetched import Place, sweep
from musicgen_svc.weights.url_rules import Rules, is_page

_MAX_REDIRECTS = 5
_MAX_TRIES_WITHOUT_PROGRESS = 4
_TIMEOUT_S = (10, 60)  # to connect, and between two pieces
_PIECE_BYTES = 1 << 20
_LOG_EVERY_S = 5.0
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class _Lost(Exception):
    """The connection broke, or the server has a fault that may pass."""


def fetch(url: str, cache: Path, rules: Rules, session: requests.Session | None = None) -> Path:
    """The file at a URL, in `cache`. A copy from before is used if the server says that it is the same.

    Raises:
        WeightsError: the rules forbid it, the server does not give it, or the disk is full. What has
            arrived until then is no file of a checkpoint, and is gone on with the next time.
    """
    url = rules.check(url)
    if is_page(url):
        raise WeightsError(
            f"{rules.shown(url)} is a page of a repository and no file: download the repository into "
            "weights/finetuned, or name one of its files, https://huggingface.co/<repository>/resolve/main/<file>."
        )
    try:
        cache.mkdir(parents=True, exist_ok=True)
        place = Place.of(cache, url)
        sweep(cache, but=place)
        with locked(place.lock) as alone, session or requests.Session() as opened:
            if not alone:
                raise WeightsError(
                    f"{rules.shown(url)} cannot be fetched to {cache}: its file system has no locks."
                )
            return _Fetching(url, place, rules, opened).run()
    except requests.RequestException:  # an OSError that names the URL
        raise WeightsError(f"{rules.shown(url)} could not be fetched: start again to go on.") from None
    except OSError as exc:
        full = exc.errno in _DISK_FULL
        reason = "the disk is full: make room there" if full else f"{exc.strerror}: check that folder"
        raise WeightsError(f"{rules.shown(url)} cannot be kept in {cache}: {reason}.") from exc


class _Fetching:
    """One file on its way, over as many connections as it takes."""

    def __init__(self, url: str, place: Place, rules: Rules, session: requests.Session) -> None:
        self._url, self._place, self._rules, self._session = url, place, rules, session
        self._name = rules.shown(url)
        self._logged_s = time.monotonic()

    def run(self) -> Path:
        known = self._place.known()
        tries = 0
        while True:
            before = self._place.begun()[0]
            try:
                with self._asked(known[1] if known else "") as response:
                    if response.status_code == requests.codes.not_modified and known:
                        return known[0]
                    self._receive(response)
                path = self._place.finish()
            except _Lost as exc:
                if known:
                    print(f"{self._name} cannot be asked ({exc}): what it gave last is used")
                    return known[0]
                tries = 1 if self._place.begun()[0] >= before + _PIECE_BYTES else tries + 1
                if tries >= _MAX_TRIES_WITHOUT_PROGRESS:
                    raise WeightsError(
                        f"{self._name} could not be fetched ({exc}): start again to go on."
                    ) from exc
                time.sleep(2 ** (tries - 1))
            else:
                print(f"{self._name} has arrived: sha256 {path.name}")
                return path

    def _asked(self, known_etag: str) -> requests.Response:
        """The answer, its body still to come, after redirects of which each one is allowed."""
        size, etag = self._place.begun()
        headers = {"Accept-Encoding": "identity"}
        if known_etag:
            headers["If-None-Match"] = known_etag
        if size and etag:
            headers |= {"Range": f"bytes={size}-", "If-Range": etag}
        url = self._url
        for _ in range(_MAX_REDIRECTS + 1):
            try:
                response = self._session.get(
                    url, headers=headers, allow_redirects=False, stream=True, timeout=_TIMEOUT_S
                )
            except requests.RequestException as exc:
                raise _Lost(_reason(exc)) from None  # it names the URL
            except ValueError:  # requests looks at where it is sent on to, and may not understand it
                raise WeightsError(f"{self._name} is redirected to what is not a URL.") from None
            if not response.is_redirect:
                return self._accepted(response)
            response.close()
            url = self._rules.check_redirect(url, response.headers["Location"])
        raise WeightsError(f"{self._name} is redirected more than {_MAX_REDIRECTS} times.")

    def _accepted(self, response: requests.Response) -> requests.Response:
        status = response.status_code
        if status in (requests.codes.ok, requests.codes.partial_content, requests.codes.not_modified):
            return response
        response.close()
        if status == requests.codes.requested_range_not_satisfiable:
            self._place.forget()
        if status in (408, 416, 429) or status >= 500:
            raise _Lost(f"the server answers {status}")
        raise WeightsError(f"{self._name} cannot be fetched: the server answers {status}.")

    def _receive(self, response: requests.Response) -> None:
        """Writes the body behind what is there, or from the start if the server gives all of it."""
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise WeightsError(f"{self._name} cannot be fetched: the server packs what it sends.")
        offset, etag = self._place.begun()
        if response.status_code == requests.codes.ok:
            offset = 0
            self._place.begin(_strong(response.headers.get("ETag", "")))
        elif not (response.status_code == 206 and offset and _continues(response, offset, etag)):
            self._place.forget()
            raise _Lost("the server goes on with another file")
        total = _size(response, offset)
        self._check(total or offset, offset)
        with self._place.partial.open("ab") as out:
            self._log(offset, total, first=True)
            for piece in self._pieces(response):
                offset += len(piece)
                if offset > self._rules.max_bytes:
                    self._check(offset, offset)
                self._write(out, piece, total, offset)
                self._log(offset, total)
            out.flush()
            os.fsync(out.fileno())
        if total is not None and offset != total:
            raise _Lost(f"it ended after {offset} of {total} bytes")

    def _pieces(self, response: requests.Response) -> Iterator[bytes]:
        try:
            yield from response.iter_content(_PIECE_BYTES)
        except requests.RequestException as exc:
            raise _Lost(_reason(exc)) from None  # it names the URL

    def _write(self, out: IO[bytes], piece: bytes, total: int | None, offset: int) -> None:
        try:
            out.write(piece)
        except OSError as exc:
            if exc.errno not in _DISK_FULL:
                raise
            self._place.forget()
            size = f"{total:,} bytes" if total else f"more than {offset:,} bytes"
            raise WeightsError(
                f"{self._name} takes {size}, and the disk of {self._place.cache} is full: make room there."
            ) from exc

    def _check(self, total: int, offset: int) -> None:
        """
        Raises:
            WeightsError: so many bytes are more than is allowed, or than the disk has.
        """
        free = shutil.disk_usage(self._place.cache).free
        if total > self._rules.max_bytes:
            fault = f"is larger than MUSICGEN_WEIGHTS_MAX_GB allows, {self._rules.max_bytes / 1e9:g} GB"
        elif total - offset > free:
            fault = (
                f"takes {total - offset:,} more bytes, and {self._place.cache} has {free:,} left: "
                "make room there"
            )
        else:
            return
        self._place.forget()
        raise WeightsError(f"{self._name} {fault}.")

    def _log(self, done: int, total: int | None, first: bool = False) -> None:
        now_s = time.monotonic()
        if first or now_s - self._logged_s >= _LOG_EVERY_S:
            self._logged_s = now_s
            of = f" of {total / 1e6:,.0f}" if total else ""
            print(f"Fetching {self._name}: {done / 1e6:,.0f}{of} MB")


def _strong(etag: str) -> str:
    """An ETag that stands for the very bytes; a weak one does not."""
    return etag if etag.startswith('"') else ""


def _continues(response: requests.Response, offset: int, etag: str) -> bool:
    """Whether a partial answer is the rest of the same file."""
    span = response.headers.get("Content-Range", "")
    return span.startswith(f"bytes {offset}-") and response.headers.get("ETag") == etag


def _size(response: requests.Response, offset: int) -> int | None:
    """Of the whole file, in bytes. A partial answer may give less of the rest than was asked for."""
    whole = response.headers.get("Content-Range", "").rpartition("/")[2]
    if response.status_code == requests.codes.partial_content and whole.isdecimal():
        return int(whole)
    length = response.headers.get("Content-Length", "")
    return offset + int(length) if length.isdecimal() else None


def _reason(exc: requests.RequestException) -> str:
    if isinstance(exc, requests.Timeout):
        return "the server does not answer"
    if isinstance(exc, requests.exceptions.SSLError):
        return "its certificate is not trusted"
    broke = isinstance(exc, requests.exceptions.ChunkedEncodingError)
    return "the connection broke" if broke else "there is no connection"
