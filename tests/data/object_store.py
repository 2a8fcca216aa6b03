"""An object store on loopback, as much of S3 as reading needs, that can be told to fail."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


@dataclass
class Store:
    """objects: content by bucket/name. fault: what to do with a request (its number from 0, method,
    path): None, a status, or "drop" for a connection that breaks off in the middle. hidden: names
    that are not listed yet."""

    objects: dict[str, bytes] = field(default_factory=dict)
    fault: Callable[[int, str, str], int | str | None] = lambda number, method, path: None
    hidden: set[str] = field(default_factory=set)
    requests: list[tuple[str, str]] = field(default_factory=list)
    port: int = 0

    def address(self, name: str) -> str:
        return f"s3://{name}?scheme=http&endpoint_override=127.0.0.1:{self.port}&region=here"


@contextmanager
def serve() -> Iterator[Store]:
    """Runs a store until the end of the block."""
    store = Store()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer("HEAD")

        def do_GET(self) -> None:
            self._answer("GET")

        def _answer(self, method: str) -> None:
            url = urlsplit(self.path)
            name = unquote(url.path).lstrip("/")
            number = len(store.requests)
            store.requests.append((method, name))
            fault = store.fault(number, method, name)
            if isinstance(fault, int):
                codes = {403: "AccessDenied", 429: "TooManyRequests", 503: "SlowDown"}
                return self._send(fault, f"<Error><Code>{codes[fault]}</Code></Error>".encode())
            query = parse_qs(url.query)
            if "list-type" in query:
                return self._send(200, _listing(store, name.rstrip("/"), query))
            if name not in store.objects:
                return self._send(404, b"<Error><Code>NoSuchKey</Code></Error>")
            content, status = store.objects[name], 200
            if wanted := self.headers.get("Range"):
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                content, status = content[int(first) : int(last) + 1], 206
            self._send(status, content, drop=fault == "drop")

        def _send(self, status: int, content: bytes, drop: bool = False) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Last-Modified", formatdate(1_700_000_000, usegmt=True))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[: len(content) // 2] if drop else content)
            if drop:
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    store.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _listing(store: Store, bucket: str, query: dict[str, list[str]]) -> bytes:
    prefix = f"{bucket}/{query.get('prefix', [''])[0]}"
    found = [
        f"<Contents><Key>{escape(name.removeprefix(f'{bucket}/'))}</Key><Size>{len(content)}</Size>"
        "<LastModified>2023-11-14T22:13:20.000Z</LastModified></Contents>"
        for name, content in sorted(store.objects.items())
        if name.startswith(prefix) and name not in store.hidden
    ]
    return (
        f"<ListBucketResult><KeyCount>{len(found)}</KeyCount><IsTruncated>false</IsTruncated>"
        f"{''.join(found)}</ListBucketResult>"
    ).encode()
