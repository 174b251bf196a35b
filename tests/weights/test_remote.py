"""Fetching a checkpoint from a URL: what is allowed, how a fetch is resumed, and what messages show."""

import fcntl
import hashlib
import os
import re
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import hypothesis
import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from requests.adapters import HTTPAdapter

from musicgen_svc.errors import WeightsError
from musicgen_svc.settings import Settings
from musicgen_svc.weights import remote
from musicgen_svc.weights.catalog import read_catalog
from musicgen_svc.weights.cog_weights import is_url, quoted_path
from musicgen_svc.weights.paths import FETCHED, Weights, local_path
from musicgen_svc.weights.remote import fetch
from musicgen_svc.weights.url_cache import CacheEntry
from musicgen_svc.weights.url_rules import Rules

URL = "https://weights.example.com/a/trained_model.tar"
RULES = Rules(("example.com", "other.net"), 10_000_000)
CONTENT = bytes(range(256)) * 12_000  # 3 MB, three pieces
CHANGED = CONTENT[::-1]


@dataclass
class Host:
    """The files of the test server, by host and path, and the faults that it shows."""

    files: dict[str, bytes] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    statuses: list[int] = field(default_factory=list)
    """The HTTP statuses of the next answers."""
    cuts: list[int] = field(default_factory=list)
    """The numbers of bytes after which the next answers break off."""
    etags: bool = True
    weak: bool = False
    heeds_if_range: bool = True
    declares: bool = True
    """Whether it says how long a file is."""
    longest_rest: int | None = None
    """The most bytes that it sends if the rest of a file is asked for; None: all of them."""
    extra: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    """The requests so far, each as its host and path, and its headers."""
    after_cut: Callable[[], None] = lambda: None

    def starts(self) -> list[str]:
        """Returns the header `Range` of each request; an empty text where there was none."""
        return [headers.get("Range", "") for _, headers in self.asked]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        host: Host = self.server.host  # type: ignore[attr-defined]
        path = self.path.split("?")[0].lstrip("/")
        host.asked.append((path, dict(self.headers)))
        self.close_connection = True
        if host.statuses and (status := host.statuses.pop(0)) != 200:
            return self._head(status, {"Content-Length": "0"})
        if path in host.redirects:
            return self._head(302, {"Location": host.redirects[path], "Content-Length": "0"})
        if path not in host.files:
            return self._head(404, {"Content-Length": "0"})
        content = host.files[path]
        etag = f'{"W/" if host.weak else ""}"{hashlib.md5(content).hexdigest()}"'
        headers = {"ETag": etag} if host.etags else {}
        if host.etags and self.headers.get("If-None-Match") == etag:
            return self._head(304, headers)
        span = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = 0
        if span and (not host.heeds_if_range or self.headers["If-Range"] == etag):
            start, size = int(span[1]), len(content)
            content = content[: start + (host.longest_rest or size)]
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{size}"
        if host.declares:
            headers["Content-Length"] = str(len(content) - start)
        self._head(206 if start else 200, headers | host.extra)
        if host.cuts:
            self.wfile.write(content[start : start + host.cuts.pop(0)])
            host.after_cut()
        else:
            self.wfile.write(content[start:])
        return None

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Connection": "close"} | headers).items():
            self.send_header(name, value)
        self.end_headers()


class Network(HTTPAdapter):
    """Sends each request for an https host to the test server. No other server is reached."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self._port = port

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        assert kwargs["verify"] is True, "certificates are checked"
        assert request.url is not None
        parts = urlsplit(request.url)
        assert parts.scheme == "https"
        request.url = f"http://127.0.0.1:{self._port}/{parts.hostname}{parts.path}?{parts.query}"
        return super().send(request, *args, **kwargs)


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadingHTTPServer]:
    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.handle_error = lambda *_: None  # type: ignore[method-assign]
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


@pytest.fixture
def host(server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    made = Host({"weights.example.com/a/trained_model.tar": CONTENT})
    server.host = made  # type: ignore[attr-defined]
    return made


@pytest.fixture
def get(server: ThreadingHTTPServer, tmp_path: Path) -> Callable[..., Path]:
    def fetched(url: str = URL, rules: Rules = RULES) -> Path:
        session = requests.Session()
        session.trust_env = False
        session.mount("https://", Network(server.server_port))
        return fetch(url, tmp_path / "cache", rules, session)

    return fetched


def loadable(cache: Path) -> list[Path]:
    """Returns the files in the cache that have the name of a complete file."""
    return [path for path in cache.iterdir() if re.fullmatch("[0-9a-f]{64}", path.name)]


def test_a_file_is_kept_by_its_content_whatever_it_is_called(host: Host, get: Any) -> None:
    host.files["weights.example.com/..%2F..%2Fetc/passwd"] = b"evil"
    host.extra = {"Content-Disposition": 'attachment; filename="../../evil"'}
    first = get()
    assert first.read_bytes() == CONTENT
    assert first.name == hashlib.sha256(CONTENT).hexdigest()
    second = get("https://weights.example.com/..%2f..%2fetc/passwd?token=secret")
    assert second == first.with_name(hashlib.sha256(b"evil").hexdigest())
    assert sorted(loadable(first.parent)) == sorted([first, second])
    assert {path.parent for path in first.parent.parent.rglob("*") if path.is_file()} == {first.parent}


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://weights.example.com/a", "must begin with https://"),
        ("ftp://weights.example.com/a", "must begin with https://"),
        ("file:///etc/passwd", "must begin with https://"),
        ("s3://weights/a", "must begin with https://"),
        ("https://evil.com/a", "allows example.com, other.net"),
        ("https://notexample.com/a", "allows example.com"),
        ("https://example.com.evil.com/a", "allows example.com"),
        ("https://example.com@evil.com/a", "allows example.com"),
        ("https://user:word@example.com/a", "allows example.com"),
        ("https://evil.com\\@example.com/a", "allows example.com"),
        ("https://evil.com#@example.com/a", "allows example.com"),
        ("https://127.0.0.1/a", "allows example.com"),
        ("https://[::1]/a", "allows example.com"),
        ("https://169.254.169.254/latest/meta-data", "allows example.com"),
        ("https://localhost/a", "allows example.com"),
        ("https:///a", "not a URL that can be fetched"),
        ("https://exa mple.com/a", "not a URL|allows example.com"),
    ],
)
def test_only_https_from_the_hosts_of_the_setting(url: str, message: str, host: Host, get: Any) -> None:
    with pytest.raises(WeightsError, match=message) as caught:
        get(url)
    assert host.asked == []
    assert "word" not in str(caught.value), "the password may be a secret"


@pytest.mark.parametrize(
    "target",
    [
        "https://evil.com/x",
        "http://weights.example.com/x",
        "//evil.com/x",
        "https://127.0.0.1/x",
        "file:///x",
    ],
)
def test_every_redirect_is_checked_again(target: str, host: Host, get: Any, tmp_path: Path) -> None:
    host.redirects["weights.example.com/start"] = "https://cdn.other.net/next"
    host.redirects["cdn.other.net/next"] = target
    with pytest.raises(WeightsError, match=r"must begin with https|may not be fetched"):
        get("https://weights.example.com/start")
    assert [path for path, _ in host.asked] == ["weights.example.com/start", "cdn.other.net/next"]
    assert loadable(tmp_path / "cache") == []


def test_redirects_between_allowed_hosts_are_followed_but_not_for_ever(host: Host, get: Any) -> None:
    host.redirects["weights.example.com/start"] = "https://cdn.other.net/next?signature=1"
    host.redirects["cdn.other.net/next"] = "/file"
    host.files["cdn.other.net/file"] = b"model"
    assert get("https://weights.example.com/start").read_bytes() == b"model"
    host.redirects["cdn.other.net/next"] = "/next"
    with pytest.raises(WeightsError, match="redirected more than 5 times"):
        get("https://weights.example.com/start?2")


@pytest.mark.parametrize("declares", [True, False])
def test_a_file_that_is_too_large_is_refused(declares: bool, host: Host, get: Any, tmp_path: Path) -> None:
    """It is refused by its declared length, or else while it is read, as soon as it is too long."""
    host.declares = declares
    with pytest.raises(WeightsError, match=r"MUSICGEN_WEIGHTS_MAX_GB allows, 0.001 GB"):
        get(rules=Rules(RULES.hosts, 1_000_000))
    assert [path for path in (tmp_path / "cache").iterdir() if path.suffix not in (".lock",)] == []


def test_a_disk_too_small_is_said_before_it_is_full(
    host: Host, get: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(
        WeightsError, match=r"takes 3,072,000 more bytes, and .* has 1,000 left: make room there"
    ):
        get()
    assert loadable(tmp_path / "cache") == []


def test_a_fetch_continues_after_a_cut_connection(host: Host, get: Any, tmp_path: Path) -> None:
    cut = 2 * remote._PIECE_BYTES
    host.cuts = [cut]
    seen: list[list[Path]] = []
    host.after_cut = lambda: seen.append(loadable(tmp_path / "cache"))
    assert get().read_bytes() == CONTENT
    assert host.starts() == ["", f"bytes={cut}-"]
    assert seen == [[]], "nothing can be loaded before the file is complete"


def test_a_rest_that_is_less_than_was_asked_for_is_not_the_end(host: Host, get: Any) -> None:
    host.cuts, host.longest_rest = [remote._PIECE_BYTES], 700_000
    assert get().read_bytes() == CONTENT
    assert len(host.starts()) == 4


def test_a_server_that_stops_answering_leaves_nothing_to_load_and_the_next_start_continues(
    host: Host, get: Any, tmp_path: Path
) -> None:
    cut = remote._PIECE_BYTES
    host.cuts = [cut]
    host.statuses = [200, 503, 503, 503, 503]
    with pytest.raises(WeightsError, match=r"could not be fetched \(the server answers 503\): start again"):
        get()
    assert loadable(tmp_path / "cache") == []
    host.statuses, host.asked = [], []
    assert get().read_bytes() == CONTENT
    assert host.starts() == [f"bytes={cut}-"]


@pytest.mark.parametrize("heeds", [True, False])
def test_a_file_that_changes_halfway_starts_over(heeds: bool, host: Host, get: Any) -> None:
    """This holds even if the server ignores If-Range, and sends the rest of the new file."""
    host.heeds_if_range = heeds
    host.cuts = [2 * remote._PIECE_BYTES]
    host.after_cut = lambda: host.files.update({"weights.example.com/a/trained_model.tar": CHANGED})
    assert get().read_bytes() == CHANGED


@pytest.mark.parametrize("kind", ["none", "weak"])
def test_without_a_strong_etag_it_starts_over(kind: str, host: Host, get: Any) -> None:
    host.etags, host.weak = kind != "none", kind == "weak"
    host.cuts = [2 * remote._PIECE_BYTES]
    assert get().read_bytes() == CONTENT
    assert host.starts() == ["", ""]


def test_a_file_shorter_than_declared_never_arrives(host: Host, get: Any, tmp_path: Path) -> None:
    host.cuts = [1000] * 20
    with pytest.raises(WeightsError, match="could not be fetched"):
        get()
    assert loadable(tmp_path / "cache") == []


def test_a_copy_is_used_while_the_server_has_the_same_or_cannot_be_asked(
    host: Host, get: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    first = get()
    stamp = first.stat().st_mtime_ns
    assert get() == first
    host.statuses = [500]
    assert get() == first
    assert first.stat().st_mtime_ns == stamp
    assert "the file of an earlier fetch is used" in capsys.readouterr().out
    host.files["weights.example.com/a/trained_model.tar"] = CHANGED
    assert get().read_bytes() == CHANGED
    assert first.read_bytes() == CONTENT, "another process may have it open"


def test_a_copy_that_is_not_whole_is_fetched_again(host: Host, get: Any) -> None:
    first = get()
    first.write_bytes(CONTENT[:1000])
    assert get().read_bytes() == CONTENT


def test_a_status_or_a_compressed_answer_is_an_error_that_says_so(host: Host, get: Any) -> None:
    with pytest.raises(
        WeightsError, match=r"COG_WEIGHTS \(a URL of example.com\) .*: the server answers 404\.$"
    ):
        get("https://weights.example.com/no?token=secret")
    host.extra = {"Content-Encoding": "gzip"}
    with pytest.raises(WeightsError, match="packs what it sends"):
        get()


def test_progress_is_logged_without_secrets(host: Host, get: Any, capsys: pytest.CaptureFixture[str]) -> None:
    get(URL + "?token=secret")
    log = capsys.readouterr().out
    assert "Fetching COG_WEIGHTS (a URL of example.com): 0 of 3 MB" in log and "has arrived: sha256" in log
    assert "secret" not in log


def test_no_error_says_the_secret_of_a_url_in_what_caused_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log shows the causes of an error too, so none of them may hold the secret."""
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    nobody = requests.Session()
    nobody.trust_env = False
    nobody.mount("https://", Network(1))
    for url in (f"{URL}?token=secret", "https://[secret/x"):
        with pytest.raises(WeightsError) as caught:
            fetch(url, tmp_path, RULES, nobody)
        assert "token=secret" not in "".join(traceback.format_exception(caught.value))


def test_fetches_at_the_same_time_end_with_one_complete_file(host: Host, get: Any) -> None:
    results: list[Path] = []
    threads = [threading.Thread(target=lambda: results.append(get())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3 and len(set(results)) == 1
    assert results[0].read_bytes() == CONTENT
    assert sum("If-None-Match" not in headers for _, headers in host.asked) == 1


def test_a_repository_is_no_file() -> None:
    with pytest.raises(WeightsError, match="is a page of a repository and no file"):
        local_path("https://huggingface.co/facebook/musicgen-small", Settings())


def test_cog_weights_may_be_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: Path) -> None:
    """The rules are made of the settings, and `Weights` gets the path of the fetched file."""
    seen: list[tuple[str, Path, Rules]] = []

    def fetched(url: str, cache: Path, rules: Rules) -> Path:
        seen.append((url, cache, rules))
        return weights / "small"

    monkeypatch.setattr(remote, "fetch", fetched)
    settings = Settings(weights_dir=tmp_path, weights_hosts=" Example.com , b.org", weights_max_gb=2)
    given = local_path(URL, settings)
    assert seen == [(URL, tmp_path / FETCHED, Rules(("example.com", "b.org"), 2_000_000_000))]
    assert Weights.at(tmp_path, None, given).finetuned == weights / "small"  # type: ignore[arg-type]
    assert local_path("a/path", settings) == "a/path" and local_path(None, settings) is None


def test_by_default_replicate_and_hugging_face_are_allowed() -> None:
    rules = Rules(tuple(Settings().weights_hosts.split(",")), 1)
    for host in (
        "replicate.delivery",
        "pbxt.replicate.delivery",
        "huggingface.co",
        "cas-bridge.xethub.hf.co",
    ):
        assert rules.check(f"https://{host}/x")


# --- what is shown of a URL ---------------------------------------------------------------------------

URLS = [
    "https://weights.example.com/a/model.tar",
    "https://weights.example.com:443/a/model.tar?signature=1&expires=2#part",
    "https://user:word@example.com/a",
    "https:user:word@example.com",
    "https:/example.com/a",
    "https//example.com/a",
    "https://example.com:word/",
    "https://evil.com\\@example.com/a",
    "HTTPS://EXAMPLE.COM/a",
    "https://ex\u00e4mple.com/\u2026",
    "https://[::1]:80/a",
    "https://[half/a",
    "//user:word@example.com/a",
    "s3://bucket/a?key=1",
    "user:word@example.com:/a",
    "data:application/x-tar;base64,AAAA",
    "https://example.com/a\nnext: line",
    "https://example.com/%0a%00?q=%",
]
SECRETS = st.text("qxzjQXZJ0123456789", min_size=12, max_size=40)


def refused_with(url: str, cache: Path) -> str:
    """Returns the traceback that the log may show if this is COG_WEIGHTS and no server answers."""
    nobody = requests.Session()
    nobody.trust_env = False
    nobody.mount("https://", Network(1))
    own = Settings(weights_dir=cache, weights_hosts=",".join(RULES.hosts))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(remote.time, "sleep", lambda _: None)
            patch.setattr(remote.requests, "Session", lambda: nobody)
            Weights.at(cache, read_catalog(), local_path(url, own))
    except WeightsError as exc:
        return "".join(traceback.format_exception(exc, chain=True))
    raise AssertionError("there is no such server")


@given(
    secret=SECRETS,
    url=st.sampled_from(URLS),
    place=st.floats(0, 1),
    sign=st.sampled_from(["", ":", "@", "/", "\\", "?", "#", "\n", ".", "\u202e"]),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_secret_at_any_place_of_a_url_is_never_shown(
    secret: str, url: str, place: float, sign: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = round(place * len(url))
    given_url = url[:at] + sign + secret + sign + url[at:]
    hypothesis.assume(is_url(given_url) or quoted_path(given_url) == "a path that is not shown")
    said = refused_with(given_url, tmp_path) + capsys.readouterr().out
    assert secret.lower() not in said.lower()


@given(
    secret=SECRETS,
    url=st.sampled_from(URLS),
    place=st.floats(0, 1),
    sign=st.sampled_from(["", ":", "@", "/", "?", "#", "\n"]),
)
@settings(max_examples=300, deadline=None)
def test_a_redirect_shows_a_host_and_nothing_else(secret: str, url: str, place: float, sign: str) -> None:
    at = round(place * len(url))
    target = url[:at] + sign + secret + sign + url[at:]
    try:
        RULES.check_redirect(URL, target)
    except WeightsError as exc:
        said = str(exc).lower()
        asked = (urlsplit(target.replace("\n", "")).hostname or "") if "[" not in target else ""
        assert secret.lower() not in said or (f"the host {asked.lower()}," in said and "@" not in asked)


def test_a_redirect_to_a_host_that_is_not_allowed_names_it(host: Host, get: Any) -> None:
    """The operator must know which host to add to the setting."""
    host.redirects["weights.example.com/start"] = "https://cdn.evil.com/x?token=word"
    message = r"COG_WEIGHTS \(a URL of example\.com\) is redirected to the host cdn\.evil\.com, which may not"
    with pytest.raises(WeightsError, match=message) as caught:
        get("https://weights.example.com/start")
    assert "word" not in str(caught.value)
    host.redirects["weights.example.com/start"] = "https://[half/x"
    with pytest.raises(WeightsError, match="is redirected to what is not a URL"):
        get("https://weights.example.com/start")


def test_a_path_with_a_colon_is_a_path_if_something_is_there(tmp_path: Path) -> None:
    (tmp_path / "a:b").mkdir()
    given_path = str(tmp_path / "a:b")
    assert local_path(given_path, Settings(weights_dir=tmp_path)) == given_path
    with pytest.raises(WeightsError, match=r"COG_WEIGHTS is '/none/own\.pt', where there is nothing"):
        Weights.at(tmp_path, read_catalog(), "/none/own.pt")


# --- what a fetch leaves ---------------------------------------------------------------------------


def test_a_disk_that_becomes_full_is_said_with_the_size_and_is_left_empty(
    host: Host, get: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = remote._Fetch._write
    pieces: list[bytes] = []

    class Full:
        def write(self, _: bytes) -> int:
            raise OSError(28, "No space left on device")

    def second_fails(self: Any, out: Any, piece: bytes, total: int | None, offset: int) -> None:
        pieces.append(piece)
        write(self, out if len(pieces) == 1 else Full(), piece, total, offset)

    monkeypatch.setattr(remote._Fetch, "_write", second_fails)
    with pytest.raises(WeightsError, match=r"takes 3,072,000 bytes, and the disk of .* is full: make room"):
        get()
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".lock"}


def test_what_another_url_left_long_ago_is_removed_and_what_is_resumed_or_in_use_is_not(
    host: Host, get: Any, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    old, young, held = (CacheEntry.of(cache, f"{URL}/{name}") for name in ("old", "young", "held"))
    for place in (old, young, held):
        place.start_partial('"etag"')
    for place in (old, held):
        os.utime(place.partial, (0, 0))
    with held.lock.open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        get()
    assert not old.partial.exists() and not old.partial_etag.exists()
    assert young.partial.exists() and held.partial.exists()
    os.utime(young.partial, (0, 0))
    local_path(None, Settings(weights_dir=tmp_path))
    assert young.partial.exists(), "the cache is not in this folder of weights"
    cache.rename(tmp_path / FETCHED)
    local_path(None, Settings(weights_dir=tmp_path))
    assert not list((tmp_path / FETCHED).glob("*.partial"))


def test_a_fetch_continues_its_own_partial_file_however_old(host: Host, get: Any, tmp_path: Path) -> None:
    cut = remote._PIECE_BYTES
    host.cuts, host.statuses = [cut], [200, 503, 503, 503, 503]
    with pytest.raises(WeightsError):
        get()
    os.utime(CacheEntry.of(tmp_path / "cache", URL).partial, (0, 0))
    host.statuses, host.asked = [], []
    get()
    assert host.starts() == [f"bytes={cut}-"]
