"""The server of the demo page: its address and the requests it accepts."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clip_base.runtime.errors import InputError
from clip_base.runtime.lazy import installed_version
from regionclip.serve.api import DETECT, OPENAPI

LOCAL = ("127.0.0.1", "localhost", "::1", "[::1]")
UPLOAD = "/gradio_api/upload"
MAX_BODY = 1_000_000  # bytes of a request besides an uploaded file
MAX_CONNECTIONS = 200  # held at once; an open page holds up to six
KEPT = 3600  # seconds until an uploaded file is deleted
MAX_UPLOADS = 100  # files of the largest size, within that time
# The browser loads nothing from elsewhere, whatever Gradio's pages ask for; no other site frames the page.
HEADERS = {
    "content-security-policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "form-action 'self'; base-uri 'self'; frame-ancestors 'self'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def listen(host: str, port: int) -> tuple[socket.socket, str]:
    """Returns a socket that listens, and its address for a local browser; an InputError if it cannot."""
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(place, family=family)
    except (socket.gaierror, UnicodeError):
        raise InputError(f"host={host} is no address; use 127.0.0.1, or 0.0.0.0 for all networks") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"port {port} is taken; give another port=, or port=0 for a free one") from None
        raise InputError(f"cannot listen on {host}, port {port}: {os.strerror(error.errno or 0)}") from None
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}.get(host, host)
    return listener, f"http://{host}:{port}"


@contextmanager
def private_folder() -> Iterator[Path]:
    """Makes the only folder whose files the page can show; it is removed afterwards, uploads with it.

    Gradio finds it in the environment. SIGTERM ends the page as Ctrl-C does, so that nothing stays behind.
    """
    ending, before = signal.signal(signal.SIGTERM, signal.default_int_handler), dict(os.environ)
    try:
        with tempfile.TemporaryDirectory(prefix="regionclip-serve-", ignore_cleanup_errors=True) as folder:
            os.environ.update(GRADIO_TEMP_DIR=folder, GRADIO_RUN_HISTORY="False")
            yield Path(folder)
    finally:
        os.environ.clear()
        os.environ.update(before)
        signal.signal(signal.SIGTERM, ending)


def make(
    blocks: Any,
    theme: dict[str, Any],
    folder: Path,
    host: str,
    max_megabytes: float,
    add_routes: Callable[[Any], None],
) -> Any:
    """Returns the uvicorn.Server of a Gradio page, which serves until Ctrl-C and then raises it.

    Its files and uploads, of up to `max_megabytes` million bytes, are in `folder`. A local `host` is not
    accepted under other names, so that no web page elsewhere can use it through the browser. `add_routes`
    is given the FastAPI application and adds what answers beside the page.
    """
    import gradio
    import uvicorn
    from fastapi import FastAPI
    from starlette.middleware import Middleware
    from starlette.middleware.base import BaseHTTPMiddleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    limit = round(max_megabytes * 1e6)
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=LOCAL if host in LOCAL else ["*"])
    requests = Middleware(BaseHTTPMiddleware, dispatch=RequestFilter(folder, limit))
    # Its own pages of documentation load scripts from elsewhere: there is the description alone.
    names: dict[str, Any] = {
        "title": "regionclip",
        "version": installed_version(),
        "docs_url": None,
        "redoc_url": None,
    }
    app = FastAPI(openapi_url=OPENAPI, middleware=[hosts, requests], **names)
    add_routes(app)
    shut = {"footer_links": [], "ssr_mode": False, "mcp_server": False, "enable_monitoring": False}
    inner = {"openapi_url": None}
    gradio.mount_gradio_app(app, blocks, "/", max_file_size=limit, app_kwargs=inner, **shut, **theme)
    config = uvicorn.Config(app, log_level="warning", server_header=False, limit_concurrency=MAX_CONNECTIONS)
    config.timeout_graceful_shutdown = 1  # pages that are still open are cut off: no error
    server = uvicorn.Server(config)
    logging.getLogger("uvicorn.error").addFilter(lambda _: not server.should_exit)
    return server


class RequestFilter:
    """Refuses requests in which Gradio would read any named file or fetch any URL.

    A request may name files of `folder` only, and carry an uploaded file of up to `max_upload` bytes.
    """

    def __init__(self, folder: Path, max_upload: int) -> None:
        self.folder, self.max_upload = folder.resolve(), max_upload
        self._uploaded: dict[float, int] = {}  # bytes within this hour

    async def __call__(self, request: Any, answer: Any) -> Any:
        """Answers a request, as Starlette's BaseHTTPMiddleware has it."""
        from starlette.requests import ClientDisconnect
        from starlette.responses import PlainTextResponse

        try:
            refusal = await self.refusal(request)
        except ClientDisconnect:
            refusal = "cut off", 400
        response = PlainTextResponse(*refusal) if refusal else await answer(request)
        response.headers.update(HEADERS)
        return response

    async def refusal(self, request: Any) -> tuple[str, int] | None:
        """Returns why a request is not answered, and the status; None: it is."""
        headers, path = request.headers, request.scope["path"]
        if "origin" in headers and headers["origin"].partition("://")[2] != headers.get("host"):
            return "only this page may ask", 403
        if "://" in path or "/call/" in path:
            return "not a part of this page", 403
        if request.method != "POST":
            return None
        is_file = path in (UPLOAD, DETECT)
        length, most = headers.get("content-length", ""), self.max_upload * is_file
        most += MAX_BODY * (path != DETECT)  # what else a form holds
        if not length.isdecimal() or "transfer-encoding" in headers:
            return "say how long the request is", 411
        if int(length) > most:
            return f"at most {most} bytes", 413
        if not is_file:
            return ("only files of this page", 403) if self.names_other_files(await request.body()) else None
        period = time.monotonic() // KEPT
        uploaded = self._uploaded.get(period, 0) + int(length)
        if uploaded > MAX_UPLOADS * self.max_upload:
            return "too many uploads; try again later", 429
        self._uploaded = {period: uploaded}
        return None

    def names_other_files(self, body: bytes) -> bool:
        """Whether a request names a file outside the folder, or is no JSON, which the page never sends."""

        def check(entry: dict[str, Any]) -> None:
            path = entry.get("path")
            if path and not Path(str(path)).resolve().is_relative_to(self.folder):
                raise ValueError

        try:
            json.loads(body or b"{}", object_hook=check)
        except (ValueError, RecursionError, OSError):
            return True
        return False
