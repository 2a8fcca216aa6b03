"""An object store on loopback, as much of S3 (and of Google's XML interface) as runs and sources
need, that can be told to fail."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

import pytest

from arcticjax import buckets

_CODES = {
    403: "AccessDenied",
    404: "NoSuchKey",
    409: "Conflict",
    412: "PreconditionFailed",
    429: "TooManyRequests",
    503: "SlowDown",
}


@dataclass
class Store:
    """objects: content by bucket/name. fault: what to do with a request (its number from 0, method,
    bucket/name): None, a status, or "drop" for a connection that breaks off in the middle; a
    faulty request changes nothing. hidden: names that are not listed yet. late: how many listings
    do not yet show what was written or deleted since. scheme: whose interface it is asked by."""

    objects: dict[str, bytes] = field(default_factory=dict)
    fault: Callable[[int, str, str], int | str | None] = lambda number, method, path: None
    hidden: set[str] = field(default_factory=set)
    late: int = 0
    requests: list[tuple[str, str]] = field(default_factory=list)
    port: int = 0
    scheme: str = "s3"
    buckets: set[str] | None = None  # None: every bucket exists
    times: dict[str, float] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)
    _parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    _versions: dict[str, int] = field(default_factory=dict)
    _listings: int = 0
    _listed: list[tuple[int, dict[str, bytes]]] = field(default_factory=list)

    def address(self, name: str) -> str:
        region = "&region=here" if self.scheme == "s3" else ""
        place = f"{self.scheme}://{name}?scheme=http"
        return f"{place}&endpoint_override=127.0.0.1:{self.port}{region}"

    def below(self, prefix: str) -> list[str]:
        with self.lock:
            return sorted(name for name in self.objects if name.startswith(prefix))

    def write(self, name: str, content: bytes) -> None:
        with self.lock:
            self.objects[name] = content
            self.times[name] = time.time()
            self._versions[name] = self._versions.get(name, 0) + 1

    def e_tag(self, name: str) -> str:
        return f'"{hashlib.md5(self.objects[name]).hexdigest()}"'

    def version(self, name: str) -> str:
        return str(self._versions.get(name, 0) + 1)

    def listed(self) -> dict[str, bytes]:
        """The objects as a listing shows them."""
        with self.lock:
            self._listed.append((self._listings, dict(self.objects)))
            self._listings += 1
            del self._listed[: -self.late - 1]
            return {k: v for k, v in self._listed[0][1].items() if k not in self.hidden}


@contextmanager
def at_hand(patch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A store of which this process and those it starts have credentials; this one does not wait
    long before it asks again."""
    patch.setenv("AWS_ACCESS_KEY_ID", "canary-id")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "canary-secret")
    patch.setenv("GOOGLE_BEARER_TOKEN", "canary-token")
    patch.setattr(buckets, "_FIRST_WAIT_SECONDS", 0.001)
    patch.setattr(buckets, "_LONGEST_WAIT_SECONDS", 0.002)
    with serve() as store:
        yield store


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

        def do_PUT(self) -> None:
            self._answer("PUT")

        def do_POST(self) -> None:
            self._answer("POST")

        def do_DELETE(self) -> None:
            self._answer("DELETE")

        def _answer(self, method: str) -> None:
            url = urlsplit(self.path)
            name = unquote(url.path).lstrip("/")
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            query = parse_qs(url.query, keep_blank_values=True)
            with store.lock:
                number = len(store.requests)
                store.requests.append((method, name))
            fault = store.fault(number, method, name)
            if isinstance(fault, int):
                return self._fail(fault)
            if fault == "drop" and method not in ("GET", "HEAD"):
                self.close_connection = True
                return None
            bucket = name.partition("/")[0]
            if store.buckets is not None and bucket not in store.buckets:
                return self._send(404, b"<Error><Code>NoSuchBucket</Code></Error>")
            with store.lock:
                return getattr(self, f"_{method.lower()}")(name, query, body, fault == "drop")

        def _head(self, name: str, query: dict, body: bytes, drop: bool) -> None:
            self._get(name, {}, body, drop)

        def _get(self, name: str, query: dict, body: bytes, drop: bool) -> None:
            if "list-type" in query:
                return self._send(200, _listing(store, name.rstrip("/"), query), drop=drop)
            if name not in store.objects:
                return self._fail(404)
            content, status, extra = store.objects[name], 200, {}
            if wanted := self.headers.get("Range"):
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                end = min(int(last) + 1 if last else len(content), len(content))
                extra["Content-Range"] = f"bytes {first}-{end - 1}/{len(content)}"
                content, status = content[int(first) : end], 206
            self._send(status, content, drop=drop, name=name, extra=extra)

        def _put(self, name: str, query: dict, body: bytes, drop: bool) -> None:
            if "partNumber" in query:
                store._parts[query["uploadId"][0]][int(query["partNumber"][0])] = body
                return self._send(200, b"", extra={"ETag": '"part"'})
            if source := self.headers.get(
                "x-amz-copy-source", self.headers.get("x-goog-copy-source")
            ):
                source = unquote(source).lstrip("/")
                if source not in store.objects:
                    return self._fail(404)
                store.write(name, store.objects[source])
                return self._send(200, b"<CopyObjectResult><ETag>x</ETag></CopyObjectResult>")
            there = name in store.objects
            generation = self.headers.get("x-goog-if-generation-match")
            match = self.headers.get("If-Match")
            if there and (self.headers.get("If-None-Match") == "*" or generation == "0"):
                return self._fail(412)
            if match and (not there or store.e_tag(name) != match):
                return self._fail(412)
            if generation not in (None, "0") and (not there or store.version(name) != generation):
                return self._fail(412)
            store.write(name, body)
            self._send(200, b"", name=name)

        def _post(self, name: str, query: dict, body: bytes, drop: bool) -> None:
            if "uploads" in query:
                upload = f"upload-{len(store.requests)}"
                store._parts[upload] = {}
                answer = f"<UploadId>{upload}</UploadId>"
                return self._send(
                    200,
                    f"<InitiateMultipartUploadResult>{answer}</InitiateMultipartUploadResult>".encode(),
                )
            if "uploadId" in query:
                parts = store._parts.pop(query["uploadId"][0])
                store.write(name, b"".join(parts[number] for number in sorted(parts)))
                return self._send(
                    200,
                    b"<CompleteMultipartUploadResult><ETag>whole</ETag>"
                    b"</CompleteMultipartUploadResult>",
                )
            if "delete" in query:
                keys = [unescape(key) for key in re.findall("<Key>(.*?)</Key>", body.decode())]
                for key in keys:
                    store.objects.pop(f"{name.rstrip('/')}/{key}", None)
                done = "".join(f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in keys)
                return self._send(200, f"<DeleteResult>{done}</DeleteResult>".encode())
            return self._fail(404)

        def _delete(self, name: str, query: dict, body: bytes, drop: bool) -> None:
            store.objects.pop(name, None)
            self._send(204, b"")

        def _fail(self, status: int) -> None:
            self._send(status, f"<Error><Code>{_CODES[status]}</Code></Error>".encode())

        def _send(
            self,
            status: int,
            content: bytes,
            drop: bool = False,
            name: str | None = None,
            extra: dict[str, str] | None = None,
        ) -> None:
            self.send_response(status)
            headers = {"Content-Length": str(len(content)), **(extra or {})}
            if name is not None:
                headers |= {"ETag": store.e_tag(name), "x-goog-generation": store.version(name)}
                when = store.times.get(name, 1_700_000_000)
                headers["Last-Modified"] = formatdate(when, usegmt=True)
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[: len(content) // 2] if drop else content)
            if drop:
                self.close_connection = True

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """A client that was killed."""

    server = Server(("127.0.0.1", 0), Handler)
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
    delimiter = query.get("delimiter", [""])[0]
    contents, folders = [], set()
    for name, content in sorted(store.listed().items()):
        if not name.startswith(prefix):
            continue
        rest = name[len(prefix) :]
        if delimiter and delimiter in rest:
            folders.add(name[: len(prefix) + rest.index(delimiter) + 1])
            continue
        when = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(store.times.get(name, 1.7e9)))
        contents.append(
            f"<Contents><Key>{escape(name.removeprefix(f'{bucket}/'))}</Key><Size>{len(content)}"
            f"</Size><LastModified>{when}</LastModified><ETag>{json.dumps(name)}</ETag></Contents>"
        )
    prefixes = "".join(
        f"<CommonPrefixes><Prefix>{escape(one.removeprefix(f'{bucket}/'))}</Prefix>"
        "</CommonPrefixes>"
        for one in sorted(folders)
    )
    return (
        f"<ListBucketResult><KeyCount>{len(contents)}</KeyCount><IsTruncated>false</IsTruncated>"
        f"{''.join(contents)}{prefixes}</ListBucketResult>"
    ).encode()
