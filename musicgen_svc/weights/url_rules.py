"""Which URLs a checkpoint may be fetched from, and how messages name a URL.

Any part of a URL may be a secret, above all if the URL was mistyped. Therefore messages show only the entry
of MUSICGEN_WEIGHTS_HOSTS that allows its host and, for a redirect, the host, if the URL has the usual form.
"""

import re
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

import requests

from musicgen_svc.errors import WeightsError

_USUAL_FORM = re.compile(
    r"https?://((?:[a-z0-9](?:[a-z0-9-]*[a-z0-9])?\.)+[a-z]{2,63})(?::[0-9]{1,5})?(?:[/?#].*)?",
    re.ASCII | re.DOTALL,
)


@dataclass(frozen=True)
class Rules:
    """What may be fetched: from which hosts, and how large a file."""

    hosts: tuple[str, ...]
    """Names of hosts. Each allows its subdomains too."""
    max_bytes: int

    def check(self, url: str) -> str:
        """The URL in the form in which it is requested.

        Raises:
            WeightsError: it is not https, or its host is not allowed.
        """
        prepared, fault = self._prepare(url)
        if fault:
            raise WeightsError(f"{self.label(url)} {fault}.")
        return prepared

    def check_redirect(self, url: str, location: str) -> str:
        """The URL that a server redirects to, in the form in which it is requested.

        Raises:
            WeightsError: as `check`.
        """
        try:
            target = urljoin(url, location)
        except ValueError:
            target = ""
        prepared, fault = self._prepare(target)
        if fault:
            raise WeightsError(
                f"{self.label(url)} is redirected to {_redirect_label(target)}, which {fault}."
            )
        return prepared

    def label(self, url: str) -> str:
        """The name of the URL in messages, without any text of the URL."""
        try:
            entry = self._entry(_host(url))
        except ValueError:
            entry = None
        return f"COG_WEIGHTS (a URL of {entry})" if entry else "COG_WEIGHTS (a URL)"

    def _prepare(self, url: str) -> tuple[str, str]:
        """The URL as it is requested, and why it must not be: the end of a sentence, or an empty text."""
        try:
            # requests normalizes the URL: the normalized one is checked, because it is requested.
            prepared = requests.Request("GET", url).prepare().url or ""
            scheme, user, host = urlsplit(prepared).scheme, urlsplit(prepared).username, _host(prepared)
        except (requests.RequestException, ValueError):
            return "", "is not a URL that can be fetched"
        if scheme != "https":
            return "", "cannot be fetched: a URL must begin with https://"
        if user is not None or not self._entry(host):
            return "", f"may not be fetched: MUSICGEN_WEIGHTS_HOSTS allows {', '.join(self.hosts)}"
        return prepared, ""

    def _entry(self, host: str) -> str | None:
        """The entry of `hosts` that allows a host; None if none does."""
        return next((entry for entry in self.hosts if host == entry or host.endswith(f".{entry}")), None)


def is_page(url: str) -> bool:
    """Whether the URL is the page of a Hugging Face repository, and not one of its files."""
    parts = urlsplit(url)
    return parts.hostname == "huggingface.co" and "/resolve/" not in parts.path


def _host(url: str) -> str:
    """The host's name, without the dot that may end it."""
    return (urlsplit(url).hostname or "").rstrip(".")


def _redirect_label(url: str) -> str:
    """The name of a redirect's target in messages.

    It is the host, which is no secret from whoever carries the request, but only if the URL has the usual
    form: otherwise the text that is parsed as the host may be something else.
    """
    match = _USUAL_FORM.fullmatch(url)
    return f"the host {match[1]}" if match else "a URL that is not shown"
