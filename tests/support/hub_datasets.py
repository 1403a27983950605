"""A stand-in for the Hub's datasets on this machine: one repository with one Parquet file, as the
file system of `huggingface_hub` asks for it."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_secret"
OID = "0" * 40


@contextmanager
def serving_dataset(content: bytes) -> Iterator[str]:
    """The endpoint, which has data/a.parquet in some/one, for those who have the token."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

        def do_GET(self) -> None:
            place = self.path.partition("?")[0]
            listed: dict[str, dict[str, Any]] = {
                "/tree/main": {"type": "directory", "path": "data"},
                "/tree/main/data": {"type": "file", "path": "data/a.parquet", "size": len(content)},
            }
            root = "/api/datasets/some/one"
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.answer(401, b"{}")
            elif place == root:
                self.answer(200, json.dumps({"id": "some/one", "sha": OID}).encode())
            elif (tree := listed.get(place.removeprefix(root))) is not None:
                self.answer(200, json.dumps([tree | {"oid": OID}]).encode())
            elif place.endswith("/resolve/main/data/a.parquet"):
                first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
                self.answer(206, content[first : last + 1])
            else:
                self.answer(404, b"{}")

        def answer(self, code: int, body: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
