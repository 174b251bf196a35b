"""The answer that brings the player page to a browser."""

import pytest

from musicgen_svc.cli.player import page


@pytest.mark.parametrize("target", [b"/player", b"/player?prompt=x"])
def test_get_brings_the_page_and_head_its_head(target: bytes) -> None:
    answer = page(b"GET", target)
    assert answer is not None
    head, body = answer.split(b"\r\n\r\n", 1)
    assert head.startswith(b"HTTP/1.1 200 OK\r\n") and b"text/html" in head
    assert f"Content-Length: {len(body)}".encode() in head and body.startswith(b"<!doctype html>")
    assert page(b"HEAD", target) == head + b"\r\n\r\n"


@pytest.mark.parametrize(
    ("method", "target"),
    [(b"POST", b"/player"), (b"GET", b"/players"), (b"GET", b"/"), (b"GET", b"/player/x")],
)
def test_other_requests_are_cogs(method: bytes, target: bytes) -> None:
    assert page(method, target) is None


def test_the_page_names_no_other_server() -> None:
    answer = page(b"GET", b"/player")
    assert answer is not None
    _, body = answer.split(b"\r\n\r\n", 1)
    assert b"http:" not in body and b"https:" not in body and b"src=" not in body
