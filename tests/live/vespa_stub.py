"""An HTTP/2 endpoint that answers `vespa feed` as Vespa does, and keeps what it was sent."""

from __future__ import annotations

import gzip
import socket
import threading
from typing import Any

import h2.config
import h2.connection
import h2.events


class VespaStub:
    """Operations by path, of a feed."""

    def __init__(self) -> None:
        self.operations: list[tuple[str, bytes]] = []
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        state = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
        state.initiate_connection()
        connection.sendall(state.data_to_send())
        streams: dict[int, tuple[str, bytearray]] = {}
        with connection:
            while data := connection.recv(1 << 16):
                for event in state.receive_data(data):
                    self._handle(event, state, streams)
                connection.sendall(state.data_to_send())

    def _handle(self, event: Any, state: Any, streams: dict[int, tuple[str, bytearray]]) -> None:
        if isinstance(event, h2.events.RequestReceived):
            streams[event.stream_id] = dict(event.headers)[":path"], bytearray()
        elif isinstance(event, h2.events.DataReceived):
            streams[event.stream_id][1].extend(event.data)
            state.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.StreamEnded):
            path, body = streams.pop(event.stream_id)
            if body[:2] == b"\x1f\x8b":
                body = bytearray(gzip.decompress(body))
            with self._lock:
                self.operations.append((path, bytes(body)))
            state.send_headers(event.stream_id, [(":status", "200"), ("content-type", "application/json")])
            state.send_data(event.stream_id, b'{"pathId":"x","id":"x"}', end_stream=True)
