"""The page that plays music while it is generated, and the answer that brings it to a browser.

It is served at /player of the server, because a browser lets a page of another origin read no answers of the
API.
"""

from pathlib import Path

PAGE = Path(__file__).with_name("player.html")
PATH = b"/player"
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "media-src 'self' blob: http: https:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What the page may load: nothing but this server's API, and the file that a prediction made."""


def page(method: bytes, target: bytes) -> bytes | None:
    """Returns the whole HTTP answer to a request for the page; None: the request is for something else."""
    if method not in (b"GET", b"HEAD") or target.partition(b"?")[0] != PATH:
        return None
    body = PAGE.read_bytes()
    head = (
        "HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\nConnection: close\r\n"
        f"Content-Length: {len(body)}\r\nCache-Control: no-cache\r\nX-Content-Type-Options: nosniff\r\n"
        f"Content-Security-Policy: {POLICY}\r\n\r\n"
    )
    return head.encode() + (body if method == b"GET" else b"")
