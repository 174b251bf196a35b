"""Which URLs a checkpoint may come from, and what messages call them.

Any part of a URL may be a secret, most of all of one that was mistyped. So nothing of its text is shown: only
the entry of MUSICGEN_WEIGHTS_HOSTS that it falls under and, of a redirect, the host, if it is spelled as one.
"""

import re
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

import requests

from musicgen_svc.errors import WeightsError

_PUBLIC = re.compile(
    r"https?://((?:[a-z0-9](?:[a-z0-9-]*[a-z0-9])?\.)+[a-z]{2,63})(?::[0-9]{1,5})?(?:[/?#].*)?",
    re.ASCII | re.DOTALL,
)


@dataclass(frozen=True)
class Rules:
    """What may be fetched."""

    hosts: tuple[str, ...]
    """Names of hosts; each stands for its subdomains too."""
    max_bytes: int

    def check(self, url: str) -> str:
        """The URL as it is sent.

        Raises:
            WeightsError: it is not https, or its host is none of `hosts`.
        """
        sent, fault = self._judged(url)
        if fault:
            raise WeightsError(f"{self.shown(url)} {fault}.")
        return sent

    def check_redirect(self, url: str, location: str) -> str:
        """The URL that a server sends us on to, as it is sent.

        Raises:
            WeightsError: as `check`.
        """
        try:
            target = urljoin(url, location)
        except ValueError:
            target = ""
        sent, fault = self._judged(target)
        if fault:
            raise WeightsError(f"{self.shown(url)} is redirected to {_public(target)}, which {fault}.")
        return sent

    def shown(self, url: str) -> str:
        """What messages call the URL."""
        try:
            entry = self._entry(_host(url))
        except ValueError:
            entry = None
        return f"COG_WEIGHTS (a URL of {entry})" if entry else "COG_WEIGHTS (a URL)"

    def _judged(self, url: str) -> tuple[str, str]:
        """The URL as it is sent, and why it is not: the rest of a sentence about it, or nothing."""
        try:
            # In requests' own spelling: what is checked is what is asked.
            sent = requests.Request("GET", url).prepare().url or ""
            scheme, named_user, host = urlsplit(sent).scheme, urlsplit(sent).username, _host(sent)
        except (requests.RequestException, ValueError):
            return "", "is not a URL that can be fetched"
        if scheme != "https":
            return "", "cannot be fetched: a URL must begin with https://"
        if named_user is not None or not self._entry(host):
            return "", f"may not be fetched: MUSICGEN_WEIGHTS_HOSTS allows {', '.join(self.hosts)}"
        return sent, ""

    def _entry(self, host: str) -> str | None:
        """The entry of `hosts` that a host falls under."""
        return next((own for own in self.hosts if host == own or host.endswith(f".{own}")), None)


def is_page(url: str) -> bool:
    """Whether it is the page of a Hugging Face repository, and no file."""
    parts = urlsplit(url)
    return parts.hostname == "huggingface.co" and "/resolve/" not in parts.path


def _host(url: str) -> str:
    return (urlsplit(url).hostname or "").rstrip(".")


def _public(url: str) -> str:
    """The host, which whoever carries the request can read; only if all before it is as it must be."""
    found = _PUBLIC.fullmatch(url)
    return f"the host {found[1]}" if found else "a URL that is not shown"
