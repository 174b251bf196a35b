"""What docs/http.md says about Cog. If one of these tests fails, Cog has changed, and the document must too.

None of this is decided by the service.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import toy
from events import EVENT_STREAM, events
from processes import LIMIT_S, wait_for
from receiver import receiver
from replies import data_uri
from server import ROOT, CogServer


def test_the_version_is_the_one_that_readme_speaks_of() -> None:
    assert f"Cog {version('cog')}" in (ROOT / "docs" / "http.md").read_text()


@pytest.mark.parametrize(("body", "status"), [(b"{", 400), (b'{"input": 1', 400), (b'{"webhook": 1}', 422)])
def test_a_body_that_is_no_request_is_answered_in_plain_text(
    toy_server: CogServer, body: bytes, status: int
) -> None:
    headers = {"Content-Type": "application/json"}
    answer = toy_server.request("POST", "/predictions", data=body, headers=headers)
    assert answer.status_code == status
    assert answer.headers["content-type"].startswith("text/plain")


def test_the_root_names_a_page_that_is_not_there(toy_server: CogServer) -> None:
    root = toy_server.request("GET", "/").json()
    assert root["docs_url"] == "/docs"
    assert toy_server.request("GET", "/docs").status_code == 404


def test_a_webhook_s_start_says_processing_and_a_prefix_for_outputs_is_ignored(toy_server: CogServer) -> None:
    with receiver() as hook:
        url = f"http://127.0.0.1:{hook.server_port}/hook"
        body: dict[str, Any] = {"input": {"prompt": "x"}, "webhook": url, "output_file_prefix": f"{url}/"}
        answer = toy_server.request("POST", "/predictions", body).json()
        assert answer["output"].startswith("data:")
        received: list[Any] = hook.received  # type: ignore[attr-defined]
        # The events come in any order. The first one would have the status `starting` by Cog's documentation.
        wait_for(lambda: {json.loads(body)["status"] for *_, body in received} == {"processing", "succeeded"})
    assert not any(method == "PUT" for method, *_ in received)


def test_an_upload_is_a_plain_put_and_no_form(checkout: Path) -> None:
    with receiver() as store:
        url = f"http://127.0.0.1:{store.server_port}/store/"
        with CogServer("--upload-url", url, root=checkout) as server:
            output = server.predict({"prompt": "x"})["output"]
        ((method, path, headers, body),) = store.received  # type: ignore[attr-defined]
    assert method == "PUT" and output.endswith(path)
    assert body == b"RIFFx" and "multipart" not in {k.lower(): v for k, v in headers.items()}["content-type"]


def test_bad_base64_is_cogs_to_refuse_or_to_make_empty(toy_server: CogServer) -> None:
    empty = toy_server.predict({"prompt": "x", "input_audio": "data:audio/wav;base64,"})
    assert empty["code"] == 200
    upper = toy_server.predict({"prompt": "x", "input_audio": data_uri(b"RIFF").replace("data:", "DATA:")})
    assert upper["code"] == 200, "Cog hands it on as a string"


@pytest.mark.parametrize(
    "accept", ["text/event-stream", "*/*, text/event-stream;q=0", "a/b ,text/event-stream;v=1"]
)
def test_an_accept_that_names_event_streams_gets_one_whatever_its_q_says(
    toy_server: CogServer, accept: str
) -> None:
    with events(toy_server, {"prompt": "x"}, accept=accept) as seen:
        assert [event.name for event in seen][-1] == "completed"


def test_an_accept_that_only_allows_event_streams_gets_none(toy_server: CogServer) -> None:
    for accept in ("*/*", "text/*", "TEXT/EVENT-STREAM"):
        answer = toy_server.request(
            "POST", "/predictions", {"input": {"prompt": "x"}}, headers={"Accept": accept}
        )
        assert answer.headers["content-type"] == "application/json", accept


def test_without_a_key_in_the_schema_file_there_are_no_event_streams(tmp_path: Path) -> None:
    """Cog finds neither in predict.py that metrics are streamed, as it looks for iterators only."""
    folder = toy.checkout(tmp_path / "checkout")
    schema = json.loads((folder / "openapi_schema.json").read_text())
    assert schema["paths"]["/predictions"]["post"].pop("x-cog-streaming") is True
    (folder / "openapi_schema.json").write_text(json.dumps(schema))
    with CogServer(root=folder) as server:
        answer = server.request("POST", "/predictions", {"input": {"prompt": "x"}}, headers=EVENT_STREAM)
        assert answer.status_code == 406
        assert server.predict({"prompt": "x"})["status"] == "succeeded"


def test_a_metric_stays_in_the_reply_unless_it_is_deleted(toy_server: CogServer) -> None:
    metrics = toy_server.predict({"prompt": "metrics"})["metrics"]
    assert metrics["kept"] == {"a": 1} and "deleted" not in metrics
    assert metrics["refusal"].startswith("TypeError"), "None is no value, and does not delete"
    with events(toy_server, {"prompt": "metrics"}) as seen:
        values = [e.data["value"] for e in seen if e.name == "metric" and e.data["name"] == "deleted"]
    assert values == [{"b": 2}, None], "both are events"


def test_the_context_of_a_request_reaches_its_scope_as_strings(toy_server: CogServer) -> None:
    body: dict[str, Any] = {"input": {"prompt": "metrics"}, "context": {"live": "1", "who": "me"}}
    assert toy_server.request("POST", "/predictions", body).json()["metrics"]["context"] == body["context"]
    body["context"] = {"live": 1}
    assert toy_server.request("POST", "/predictions", body).status_code == 422
    del body["context"]
    assert toy_server.request("POST", "/predictions", body).json()["metrics"]["context"] == {}


def test_who_joins_after_more_than_1024_events_gets_an_error_instead_of_them(toy_server: CogServer) -> None:
    for events_before, last in ((900, "metric"), (1100, "error")):
        id = f"after-{events_before}"
        running = toy_server.submit({"prompt": f"{events_before} metrics", "duration": 600}, id)
        wait_for(lambda id=id: "recorded" in (toy_server.state(id) or {"logs": ""})["logs"])  # type: ignore[misc]
        with events(toy_server, {"prompt": "x"}, id) as seen:
            names = [next(seen).name]
            names += (
                [next(seen).name for _ in range(events_before)]
                if last == "metric"
                else list(e.name for e in seen)
            )
        assert names[-1] == last, names[-3:]
        assert toy_server.cancel(id) == 200
        running.result(timeout=LIMIT_S)
