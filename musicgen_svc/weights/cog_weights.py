"""The value of COG_WEIGHTS: whether it is a path or a URL, and how a message may quote it.

The value may be mistyped, and a URL may hold a secret.
"""

import re
from pathlib import Path

_URL_START = re.compile(r"\s*(?:[a-z][a-z0-9+.-]*:|https?\W|//)", re.IGNORECASE | re.ASCII)
_PLAIN_PATH = re.compile(r"[\w./ ~+,-]+")
_MAX_QUOTED_CHARACTERS = 500


def is_url(value: str) -> bool:
    """Whether the value is meant as a URL: it begins like one, even mistyped, and no file has that name."""
    return ("://" in value or _URL_START.match(value) is not None) and not path_exists(value)


def path_exists(value: str) -> bool:
    """Whether there is a file or folder of that name. False for a text that cannot be a path."""
    try:
        return Path(value).exists()
    except (OSError, ValueError):
        return False


def quoted_path(value: str) -> str:
    """A path as messages quote it. With unusual characters it may be a URL with a secret, and is hidden."""
    plain = _PLAIN_PATH.fullmatch(value) and len(value) <= _MAX_QUOTED_CHARACTERS
    return repr(value) if plain else "a path that is not shown"
