"""Where the page is reachable, and what of Gradio's server is: the page's own files and uploads, no more."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_base.runtime.errors import InputError

if TYPE_CHECKING:
    import uvicorn

# What the page asks for. Whatever else Gradio answers (its API's description, other servers' files through
# this one, a code editor, recordings) is not found here.
API = "/gradio_api"
PAGES = frozenset(
    {"/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt"}
    | {f"{API}/{name}" for name in ("upload", "upload_progress", "queue/join", "queue/data", "run/predict")}
    | {f"{API}/{name}" for name in ("cancel", "reset", "info", "startup-events", "login_check", "app_id")}
)
FOLDERS = ("/assets/", "/static/", "/svelte/", f"{API}/file=", f"{API}/heartbeat/", "/pwa_icon")
# Nothing is loaded from elsewhere, whatever a page of Gradio's may ask for.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; worker-src 'self' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:; "
    "font-src 'self' data:; connect-src 'self' data: blob:; form-action 'self'; base-uri 'self'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]
AROUND = 1_000_000  # bytes of a request besides the uploaded file
LOCAL = ("127.0.0.1", "localhost", "::1")


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens.

    Raises:
        InputError: the port is taken or forbidden, or the host is no address of this machine.
    """
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError):
        raise InputError(f"host={host} is no address; give 127.0.0.1, or 0.0.0.0 for all networks") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(place)
        listener.listen()
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"port {port} is taken; give another port=, or port=0 for a free one") from None
        raise InputError(f"cannot listen on {host}, port {port}: {error.strerror}") from None
    return listener


def address(listener: socket.socket) -> str:
    """Returns the page's address, for the browser of this machine."""
    host, port = listener.getsockname()[:2]
    host = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def private_folder() -> Iterator[Path]:
    """Makes the only folder whose files the page can show; it is gone afterwards, uploads with it.

    Gradio reads the folder and whether it may call home from the environment. A signal to end ends it as
    Ctrl-C does, so that nothing stays behind.
    """
    settings = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}
    ending = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory(prefix="regionclip-serve-", ignore_cleanup_errors=True) as folder:
            settings["GRADIO_TEMP_DIR"] = folder
            before = {name: os.environ.get(name) for name in settings}
            os.environ.update(settings)
            try:
                yield Path(folder)
            finally:
                for name, value in before.items():
                    os.environ.pop(name) if value is None else os.environ.update({name: value})
    finally:
        signal.signal(signal.SIGTERM, ending)


def application(blocks: Any, looks: dict[str, Any], folder: Path, host: str, megabytes: float) -> Any:
    """Returns the ASGI application of a Gradio page, guarded.

    Args:
        blocks: the page.
        looks: its theme and style.
        folder: where its files and uploads are, see `private_folder`.
        host: the address that it listens on. Of a local one, other sites' names for it are not accepted, so
            that no web page elsewhere can use it through the browser.
        megabytes: largest upload, in millions of bytes.
    """
    import gradio
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    limit = round(megabytes * 1e6)
    app = gradio.mount_gradio_app(
        app, blocks, "/", footer_links=[], max_file_size=limit, ssr_mode=False, mcp_server=False, **looks
    )
    guarded = Guard(app, folder, limit + AROUND)
    return TrustedHostMiddleware(guarded, [*LOCAL, "[::1]"]) if host in LOCAL else guarded


class Guard:
    """Lets through what the page needs, with headers that keep the browser from asking anyone else.

    Args:
        app: an ASGI application.
        folder: the only one whose files a request may name.
        most: bytes that a request may carry.
    """

    def __init__(self, app: Any, folder: Path, most: int) -> None:
        self.app, self.folder, self.most = app, folder, most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers a request as ASGI 3 has it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        refusal = self.refuses(scope)
        if refusal is None and scope["method"] == "POST" and scope["path"] != f"{API}/upload":
            body, receive = await _read(receive)
            if refers_elsewhere(body, self.folder):
                refusal = 403, "only files of this page"

        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *HEADERS]}
            await send(message)

        if refusal is None:
            await self.app(scope, receive, sending)
            return
        status, reason = refusal
        await sending({"type": "http.response.start", "status": status, "headers": []})
        await sending({"type": "http.response.body", "body": reason.encode()})

    def refuses(self, scope: Any) -> tuple[int, str] | None:
        """Returns status and reason for a request that is not answered; None: it is."""
        path = scope["path"]
        known = (path.rstrip("/") or "/") in PAGES or path.startswith(FOLDERS)
        if scope["type"] != "http" or not known:
            return 404, "not found"
        if path.startswith(f"{API}/file=") and "://" in path:
            return 403, "only files of this page"
        if scope["method"] == "POST":
            length = dict(scope["headers"]).get(b"content-length", b"")
            if not length.isdigit():
                return 411, "say how long the request is"
            if int(length) > self.most:
                return 413, f"at most {self.most} bytes"
        return None


async def _read(receive: Any) -> tuple[bytes, Any]:
    """Returns a request's body, and a `receive` that brings it once more."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Any:
        return waiting.pop() if waiting else await receive()

    return body, again


def refers_elsewhere(body: bytes, folder: Path) -> bool:
    """Whether a request names a file outside `folder`, or is no JSON, which no page sends.

    Gradio would take files of the working directory and the system's temporary one, and fetch URLs.
    """

    def elsewhere(value: Any) -> bool:
        if isinstance(value, dict):
            path = value.get("path")
            if path and not Path(str(path)).resolve().is_relative_to(folder.resolve()):
                return True
            return any(map(elsewhere, value.values()))
        return isinstance(value, list) and any(map(elsewhere, value))

    try:
        return elsewhere(json.loads(body or b"{}"))
    except (ValueError, RecursionError, OSError):
        return True


def server(app: Any) -> uvicorn.Server:
    """Returns what serves on a socket, `run([listener])`, until Ctrl-C, which it raises again when done.

    Pages that are still open are not waited for.
    """
    import uvicorn

    return uvicorn.Server(
        uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1, server_header=False)
    )
