"""What of Gradio's server others can reach through the page of `regionclip serve`: hostile requests."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'regionclip[serve]'")

from starlette.testclient import TestClient, WebSocketDenialResponse

from clip_base.jobs.config import resolve
from regionclip.serve import server
from regionclip.serve.job import ServeConfig, make_server

HERE = "127.0.0.1:7860"
UPLOAD = "/gradio_api/upload"
FILE = {"meta": {"_type": "gradio.FileData"}}


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with server.private_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def config(detector_file: Path) -> ServeConfig:
    options = [f"weights={detector_file}", "precision=fp32", "lists=[]", "max_upload_mb=0.01"]
    return resolve(ServeConfig, None, options)


@pytest.fixture(scope="module")
def client(config: ServeConfig, folder: Path) -> Iterator[TestClient]:
    app = make_server(config, folder).config.app
    with TestClient(app, base_url=f"http://{HERE}", raise_server_exceptions=False) as client:
        yield client


def test_the_page_and_its_own_files_are_answered(client: TestClient) -> None:
    for path in ("/", "/config", "/theme.css", "/gradio_api/info"):
        assert client.get(path, headers={"origin": f"http://{HERE}"}).status_code == 200, path
    uploaded = client.post(UPLOAD, files={"files": ("a.png", b"some bytes")})
    assert uploaded.status_code == 200
    assert client.get(f"/gradio_api/file={uploaded.json()[0]}").content == b"some bytes"


@pytest.mark.parametrize(
    "path",
    [
        "/docs",
        "/openapi.json",
        "/monitoring",
        "/monitoring/summary",
        "/gradio_api/runs",
        "/gradio_api/vibe-code",
        "/gradio_api/file=/etc/passwd",
        f"/gradio_api/file={Path(__file__)}",
        "/gradio_api/file=http://127.0.0.1/secret",
        "/gradio_api/file=https://example.com/a.png",
        "/gradio_api/file=https:%2F%2Fexample.com/a.png",
        "/gradio_api/file/https://example.com/a.png",
        "/gradio_api/file=file:///etc/passwd",
        "/gradio_api/proxy=http://127.0.0.1/secret",
        "/gradio_api/proxy=example.hf.space/a.png",
    ],
)
def test_no_other_file_url_or_tool_is_reached(client: TestClient, path: str) -> None:
    assert client.get(path).status_code in (400, 403, 404)


@pytest.mark.parametrize(
    "path",
    [
        "call/predict",
        "call/update",
        "call/v2/update",
        "vibe-edit",
        "vibe-code",
        "component_server",
        "stream/x",
    ],
)
def test_the_interface_for_programs_is_closed(client: TestClient, path: str) -> None:
    component = client.get("/config").json()["components"][-1]["id"]
    body = {"data": [], "session_hash": "x", "prompt": "x", "code": "x"}
    body |= {"component_id": component, "fn_name": "ls"}
    assert client.post(f"/gradio_api/{path}", json=body).status_code in (403, 404)
    assert client.get("/gradio_api/info").json() == {"named_endpoints": {}, "unnamed_endpoints": {}}


def test_questions_wait_in_the_queue_and_not_beside_it(client: TestClient) -> None:
    update, *_ = [
        entry["id"] for entry in client.get("/config").json()["dependencies"] if len(entry["inputs"]) > 4
    ]
    body = {"fn_index": update, "data": [None, None, "cup", 0, 1, 5], "session_hash": "x"}
    assert client.post("/gradio_api/run/predict", json=body).status_code == 404
    assert client.post("/gradio_api/queue/join", json=body).status_code == 200


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ('{"data": [{"path": "FOLDER/a/b.png", "url": "http://127.0.0.1/a.png"}, "http://x", null]}', None),
        ("", None),
        ('{"data": [{"path": "FOLDER/../b.png"}]}', 403),
        ('{"data": [[{"path": "/etc/passwd"}]]}', 403),
        ('{"data": {"a": {"path": "pyproject.toml"}}}', 403),
        ('{"data": [[{"path": "\\u0068ttp://example.com/a.png"}]]}', 403),
        ('{"data": [{"path": "\\u0000"}]}', 403),
        ('{"data": [{"path": {"path": "/etc/passwd"}}]}', 403),
        ("[" * 100_000, 403),
        ("no JSON", 403),
    ],
)
def test_a_request_that_names_a_file_outside_the_pages_folder_is_refused(
    body: str, status: int | None, client: TestClient, folder: Path
) -> None:
    answer = client.post("/gradio_api/queue/join", content=body.replace("FOLDER", str(folder)))
    assert (answer.status_code == 403) == (status == 403)


def test_a_recording_is_not_taken(client: TestClient) -> None:
    files = {"video": ("a.mp4", b"some bytes")}
    assert client.post("/gradio_api/process_recording", files=files).status_code == 403


@pytest.mark.parametrize("origin", ["http://example.com", "http://127.0.0.1:8000", "http://[", "null", ""])
def test_another_sites_requests_are_refused(client: TestClient, origin: str) -> None:
    assert client.get("/config", headers={"origin": origin}).status_code == 403
    files = {"files": ("a.png", b"x")}
    assert client.post(UPLOAD, files=files, headers={"origin": origin}).status_code == 403
    assert client.get("/config", headers={"host": "example.com"}).status_code == 400


def test_websockets_are_refused(client: TestClient) -> None:
    with pytest.raises(WebSocketDenialResponse), client.websocket_connect("/gradio_api/queue/join"):
        pass


def test_large_requests_and_those_of_unknown_length_are_refused(client: TestClient) -> None:
    def upload(size: int) -> int:
        return client.post(UPLOAD, files={"files": ("a.png", b"x" * size)}).status_code

    assert [upload(9_000), upload(11_000), upload(1_100_000)] == [200, 413, 413]
    long = json.dumps({"data": "x" * server.MAX_BODY})
    assert client.post("/gradio_api/queue/join", content=long).status_code == 413
    assert client.post(UPLOAD, content=iter([b"x"])).status_code == 411
    both = {"content-length": "1", "transfer-encoding": "chunked"}
    assert client.post(UPLOAD, content=iter([b"x"]), headers=both).status_code == 411


def test_uploads_are_limited_in_total(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0 * server.KEPT]
    monkeypatch.setattr(server, "MAX_UPLOADS", 3)
    monkeypatch.setattr(server.time, "monotonic", lambda: now[0])
    request_filter = server.RequestFilter(folder, 1000)

    class Request:
        method, scope, headers = "POST", {"path": UPLOAD}, {"content-length": "900"}

    def refused() -> int | None:
        refusal = asyncio.run(request_filter.refusal(Request))
        return refusal and refusal[1]

    assert [refused() for _ in range(5)] == [None, None, None, 429, 429]
    now[0] += server.KEPT
    assert refused() is None


def test_held_connections_are_limited(
    config: ServeConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 4)
    page = make_server(config, folder)
    listener, _ = server.listen("127.0.0.1", 0)
    with listener:
        thread = threading.Thread(target=page.run, args=([listener],))
        thread.start()
        held = []
        try:
            place = listener.getsockname()

            def ask(path: str) -> tuple[socket.socket, bytes]:
                asked = socket.create_connection(place, timeout=60)
                asked.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
                return asked, asked.recv(12)

            for _ in range(3):
                held.append(ask("/gradio_api/heartbeat/x"))
            held += [ask("/theme.css"), ask("/theme.css")]
            assert [status[9:] for _, status in held] == [b"200"] * 3 + [b"503"] * 2
        finally:
            for asked, _ in held:
                asked.close()
            page.should_exit = True
            thread.join(60)
