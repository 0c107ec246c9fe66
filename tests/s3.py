"""A real S3 server on the loopback interface, and a proxy before it that breaks requests."""

from __future__ import annotations

import http.client
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from typing import Any

import pyarrow.fs as pafs
import pytest

ACCESS_KEY, SECRET_KEY = "AKIA-of-the-test", "secret-of-the-test"
BUCKET = "corpora"


def environment(port: int) -> dict[str, str]:
    """Return what a client needs to find the server."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def has_server() -> bool:
    """Return whether moto's server is installed."""
    return all(find_spec(package) is not None for package in ("moto", "flask", "flask_cors"))


@contextmanager
def run_server() -> Iterator[int]:
    """Run moto's server with an empty bucket; yield its port."""
    if not has_server():
        pytest.skip("there is no S3 server to test with: moto[s3], flask and flask-cors are not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        connect(port).create_dir(BUCKET)
        yield port
    finally:
        server.kill()
        server.wait()


def connect(port: int) -> Any:
    """Return a client of the server itself."""
    return pafs.S3FileSystem(
        access_key=ACCESS_KEY,
        secret_key=SECRET_KEY,
        region="us-east-1",
        endpoint_override=f"http://127.0.0.1:{port}",
        allow_bucket_creation=True,
    )


def put(port: int, key: str, content: bytes) -> None:
    """Write an object into the bucket."""
    with connect(port).open_output_stream(f"{BUCKET}/{key}", compression=None) as file:
        file.write(content)


class Proxy:
    """Passes requests on to a server, and breaks a share of them: 500, 503, a reset, half a body."""

    def __init__(self, server: int, *, share: float) -> None:
        self.server, self.share = server, share
        self.broken: Counter[str] = Counter()
        self.requests: list[str] = []
        self._draw, self._lock = random.Random(17), threading.Lock()

    def choose(self, request: str) -> str:
        """Return how a request is broken; '' for not at all."""
        with self._lock:
            self.requests.append(request)
            if self._draw.random() >= self.share:
                return ""
            kinds = ("500", "503", "reset", "half") if request.startswith("GET") else ("500", "503", "reset")
            kind = self._draw.choice(kinds)
            self.broken[kind] += 1
            return kind

    @contextmanager
    def run(self) -> Iterator[int]:
        """Run the proxy; yield its port."""
        handler = type("Handler", (_Handler,), {"proxy": self})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.content = self.rfile.read(length)
        kind = self.proxy.choose(f"{self.command} {self.path}")
        if kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
        elif kind in ("500", "503"):
            self._answer(int(kind), {}, b"")
        elif self.path.startswith("/denied"):
            self._answer(403, {}, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")
        else:
            self._pass_on(half=kind == "half")

    do_HEAD = do_PUT = do_POST = do_GET  # noqa: N815  as http.server names them

    def _pass_on(self, *, half: bool) -> None:
        upstream = http.client.HTTPConnection("127.0.0.1", self.proxy.server)
        try:
            upstream.request(self.command, self.path, body=self.content or None, headers=dict(self.headers))
            response = upstream.getresponse()
            body = response.read()
            headers = {name: value for name, value in response.getheaders() if name.lower() != "connection"}
            self._answer(response.status, headers, body[: len(body) // 2] if half else body, length=len(body))
            if half:
                self.close_connection = True
        finally:
            upstream.close()

    def _answer(self, status: int, headers: dict[str, str], body: bytes, *, length: int | None = None) -> None:
        self.send_response_only(status)
        headers.setdefault("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:  # the connection was reset, by this side or the other
            self.close_connection = True

    def finish(self) -> None:
        try:
            super().finish()
        except (OSError, ValueError):
            self.close_connection = True
