"""The clip of a row: a file, or a URL that is fetched into one, and the hash of its content."""

from pathlib import Path

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from musicgen_svc.audio.reading import MAX_BYTES
from musicgen_svc.batch.rows import is_url
from musicgen_svc.errors import AudioError
from musicgen_svc.weights.lock_file import sha256_of

_TIMEOUT_S = (10, 60)  # for connecting, and between two pieces
_PIECE_BYTES = 1 << 18
_RETRIES = Retry(3, backoff_factor=1, status_forcelist=(429, 500, 502, 503, 504), raise_on_status=False)


def local_clip(clip: str, folder: Path) -> Path:
    """Returns the file of a clip; that of a URL is fetched into `folder`.

    Raises:
        AudioError: the URL cannot be fetched, or its file is too large.
    """
    if not is_url(clip):
        return Path(clip)
    path = folder / "clip"
    try:
        _fetch(clip, path)
    except requests.RequestException as exc:
        raise AudioError(
            f"input_audio is {clip!r:.200}, which cannot be fetched ({type(exc).__name__}); "
            "give the URL of an audio file that can be read from here."
        ) from exc
    return path


def clip_hash(path: Path) -> str | None:
    """Returns the sha256 of a clip; None if no request accepts it, as the request will report."""
    try:
        return sha256_of(path) if path.is_file() and path.stat().st_size <= MAX_BYTES else None
    except OSError:
        return None


def _fetch(url: str, path: Path) -> None:
    """Fetches a URL into a file.

    Raises:
        requests.RequestException: no file is sent.
        AudioError: the server refuses the request, or the file is too large.
    """
    with requests.Session() as session:
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(max_retries=_RETRIES))
        with session.get(url, stream=True, timeout=_TIMEOUT_S) as response, path.open("wb") as file:
            if not response.ok:
                raise AudioError(
                    f"input_audio is {url!r:.200}, for which the server answers {response.status_code}; "
                    "give the URL of an audio file that can be read from here."
                )
            for piece in response.iter_content(_PIECE_BYTES):
                file.write(piece)
                if file.tell() > MAX_BYTES:
                    raise AudioError(
                        f"input_audio is {url!r:.200}, which is larger than {MAX_BYTES / 2**20:g} MB; "
                        "give a smaller file."
                    )
