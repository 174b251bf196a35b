"""Which URLs a checkpoint may come from, and what of them may be shown."""

from dataclasses import dataclass
from urllib.parse import urlsplit

import requests

from musicgen_svc.errors import WeightsError


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
        try:
            # In requests' own spelling: what is checked is what is asked.
            sent = requests.Request("GET", url).prepare().url
            assert sent is not None
            parts = urlsplit(sent)
            host = (parts.hostname or "").rstrip(".")
        except (requests.RequestException, ValueError):
            raise WeightsError(f"{shown(url)} is not a URL that can be fetched.") from None
        if parts.scheme != "https":
            raise WeightsError(f"{shown(url)} cannot be fetched: a URL must begin with https://.")
        if parts.username is not None or not any(
            host == allowed or host.endswith(f".{allowed}") for allowed in self.hosts
        ):
            raise WeightsError(
                f"{shown(url)} may not be fetched: MUSICGEN_WEIGHTS_HOSTS allows {', '.join(self.hosts)}."
            )
        return sent


def shown(url: str) -> str:
    """A URL for the log: without what may be a secret, and not too long."""
    head = url.split("?", 1)[0].split("#", 1)[0]
    scheme, _, rest = head.partition("://")
    host, slash, path = rest.partition("/")
    text = f"{scheme}://{host.rpartition('@')[2]}{slash}{path}" if rest else head
    return repr(text if len(text) <= 120 else text[:119] + "…")


def is_page(url: str) -> bool:
    """Whether it is the page of a Hugging Face repository, and no file."""
    parts = urlsplit(url)
    return parts.hostname == "huggingface.co" and "/resolve/" not in parts.path
