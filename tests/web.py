"""An HTTP server on loopback that counts, fails, cuts short or crawls as a test tells it."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Web:
    """Serves `files` {"/name": bytes}; `gets` counts the requests for each."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.files: dict[str, bytes] = {}
        self.gets: Counter[str] = Counter()
        self.failures = 0  # answers with 503 that are still to come
        self.cuts = 0  # answers that break off in the middle
        self.pause_s = 0.0  # before each 4 KiB

    def url(self, name: str) -> str:
        return f"{self.address}/{name}"

    def put(self, name: str, data: bytes) -> str:
        self.files[f"/{name}"] = data
        return self.url(name)


@contextmanager
def serve() -> Iterator[Web]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            web.gets[path] += 1
            if web.failures:
                web.failures -= 1
                self.send_error(503)
            elif path not in web.files:
                self.send_error(404)
            else:
                self._send(web.files[path])

        def _send(self, data: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if web.cuts:
                web.cuts -= 1
                data = data[: len(data) // 2]
            try:
                for start in range(0, len(data), 4096):
                    time.sleep(web.pause_s)
                    self.wfile.write(data[start : start + 4096])
            except OSError:  # the client was killed
                pass

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    web = Web(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
