"""What COG_WEIGHTS holds: a path or a URL, well written or not, and what of it may be shown."""

import re
from pathlib import Path

_URL = re.compile(r"\s*(?:[a-z][a-z0-9+.-]*:|https?\W|//)", re.IGNORECASE | re.ASCII)
_PLAIN = re.compile(r"[\w./ ~+,-]+")


def is_url(given: str) -> bool:
    """Whether it is meant as a URL, mistyped perhaps: it begins like one, and no file has that name."""
    return ("://" in given or _URL.match(given) is not None) and not exists(given)


def exists(given: str) -> bool:
    """Whether there is a file or folder of that name; also for a text that could never name one."""
    try:
        return Path(given).exists()
    except (OSError, ValueError):
        return False


def shown(given: str) -> str:
    """A path as messages quote it. A text with other signs in it may be a URL with a secret."""
    return repr(given) if _PLAIN.fullmatch(given) and len(given) <= 500 else "a path that is not shown"
