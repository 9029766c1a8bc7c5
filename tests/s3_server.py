"""A real S3 endpoint on loopback (moto's), which can be told to fail, and counts what it is asked."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

BUCKET = "bucket"
ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
_ERROR = b"<?xml version='1.0'?><Error><Code>%s</Code><Message>%s</Message></Error>"


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: str | None
    is_new: bool


@dataclass
class S3Server:
    """`fault(request)` says what becomes of a request: None (all is well), a status, "short", or seconds to wait."""

    url: str = ""
    fault: Callable[[Request], int | float | str | None] = lambda _: None
    requests: list[Request] = field(default_factory=list)
    remembers: bool = True
    most_at_once: int = 0
    released: threading.Event = field(default_factory=threading.Event)
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def reset(self) -> None:
        """Forgets all objects, requests and faults."""
        from moto import s3

        s3.models.s3_backends.reset()
        self.fault, self.requests, self.most_at_once = lambda _: None, [], 0
        self.released = threading.Event()
        self.make_bucket()

    def make_bucket(self) -> None:
        import urllib.request

        urllib.request.urlopen(urllib.request.Request(f"{self.url}/{BUCKET}", method="PUT")).close()

    def keys(self, method: str) -> list[str]:
        """Of the objects that requests of this method were for, in order."""
        start = f"/{BUCKET}/"
        return [
            each.path.removeprefix(start)
            for each in self.requests
            if each.method == method and each.path.startswith(start)
        ]

    def answer(self, app: Any, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        is_new = "HTTP_IF_NONE_MATCH" in environ
        request = Request(environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("HTTP_RANGE"), is_new)
        with self._lock:
            if self.remembers:
                self.requests.append(request)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            fault = self.fault(request)
            if isinstance(fault, int) and not isinstance(fault, bool):
                code = {403: b"AccessDenied", 501: b"NotImplemented"}.get(fault, b"InternalError")
                body = _ERROR % (code, b"as the test will have it")
                start_response(
                    f"{fault} X", [("Content-Type", "text/xml"), ("Content-Length", str(len(body)))]
                )
                return [body]
            if isinstance(fault, float):
                self.released.wait(fault)
            body = b"".join(app(environ, start_response))
            return [body[: len(body) // 2]] if fault == "short" else [body]
        finally:
            with self._lock:
                self._now -= 1


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Serves until it is left; joins its threads."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = S3Server()
    moto = DomainDispatcherApplication(create_backend_app)
    http = make_server(
        "127.0.0.1", 0, lambda environ, respond: server.answer(moto, environ, respond), threaded=True
    )
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, name="s3-server")
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_port}"
    try:
        yield server
    finally:
        server.released.set()
        http.shutdown()
        http.server_close()
        thread.join()
