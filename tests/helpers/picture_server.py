"""A local server that misbehaves in every way the fetcher must survive."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.helpers.conversion import picture

PNG = picture(0)


class PictureServer(ThreadingHTTPServer):
    """Serves `/<behaviour>/<anything>`; `asked` counts paths, `most` is the most pauses at a time."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: Counter[str] = Counter()
        self.agents: set[str] = set()
        self.over = threading.Event()
        self.lock = threading.Lock()
        self.now = self.most = 0

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are part of the tests."""

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.server_port}/{path}"


@contextmanager
def serving() -> Iterator[PictureServer]:
    with PictureServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.over.set()
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: PictureServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.asked[self.path] += 1
            self.server.agents.add(self.headers["User-Agent"])
        kind = self.path.split("/")[1].partition("?")[0]
        getattr(self, f"do_{kind}", self.do_status)(kind)

    def answer(self, status: int, body: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if length != -1:
            self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def do_status(self, kind: str) -> None:
        self.answer(int(kind), b"<html>no</html>", Content_Type="text/html")

    def do_ok(self, _: str) -> None:
        self.answer(200, PNG, Content_Type="image/png")

    def do_pause(self, _: str) -> None:
        with self.server.lock:
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        self.server.over.wait(0.05)
        with self.server.lock:  # before the answer: whoever has it may ask again at once
            self.server.now -= 1
        self.do_ok("")

    def do_flaky(self, _: str) -> None:
        if self.server.asked[self.path] > 1:
            self.do_ok("")
        else:
            self.answer(503, b"", Retry_After="0")

    def do_once(self, _: str) -> None:
        if self.server.asked[self.path] > 1:
            self.do_ok("")
        else:
            self.do_status("404")

    def do_html(self, _: str) -> None:
        self.answer(200, b"<!DOCTYPE html><html>This picture is gone</html>", Content_Type="image/jpeg")

    def do_mislabelled(self, _: str) -> None:
        self.answer(200, PNG, Content_Type="text/html")

    def do_cut(self, _: str) -> None:
        self.answer(200, PNG[:-9], len(PNG))

    def do_cutchunk(self, _: str) -> None:
        self.answer(200, b"%x\r\n" % (len(PNG) + 9) + PNG, -1, Transfer_Encoding="chunked")

    def do_chunks(self, _: str) -> None:
        body = b"".join(b"%x\r\n%s\r\n" % (1, PNG[i : i + 1]) for i in range(len(PNG)))
        self.answer(200, body + b"0\r\n\r\n", -1, Transfer_Encoding="chunked")

    def do_endless(self, _: str) -> None:
        self.answer(200, PNG, -1)
        while not self.server.over.is_set():
            self.wfile.write(bytes(1 << 16))

    def do_announced(self, _: str) -> None:
        self.answer(200, PNG, 10**12)

    def do_empty(self, _: str) -> None:
        self.answer(200, b"", Content_Type="image/jpeg")

    def do_silent(self, _: str) -> None:
        self.server.over.wait(60)

    def do_drip(self, _: str) -> None:
        """Never silent for long, never done: first in the header, then in the body."""
        self.wfile.write(b"HTTP/1.0 200 OK\r\nX-Slow: ")
        while not self.server.over.wait(0.02):
            self.wfile.write(b"z")

    def do_dripbody(self, _: str) -> None:
        self.answer(200, PNG[:20], 10**6)
        while not self.server.over.wait(0.02):
            self.wfile.write(b"z")

    def do_continue(self, _: str) -> None:
        while not self.server.over.wait(0.01):
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def do_garbage(self, _: str) -> None:
        self.wfile.write(b"\0\1\2 what?\r\n\r\n")

    def do_badlength(self, _: str) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")

    def do_manyheaders(self, _: str) -> None:
        self.answer(200, PNG, None, **{f"X{i}": "y" for i in range(200)})

    def do_noai(self, _: str) -> None:
        self.answer(200, PNG, X_Robots_Tag="noai, noimageai")

    def do_otherbot(self, _: str) -> None:
        self.answer(200, PNG, X_Robots_Tag="otherbot: noindex")

    def do_gzip(self, _: str) -> None:
        self.answer(200, PNG, Content_Encoding="gzip")

    def do_moved(self, _: str) -> None:
        self.answer(302, b"", Location="../ok/after a move")

    def do_loop(self, _: str) -> None:
        self.answer(301, b"", Location="/loopback/")

    def do_loopback(self, _: str) -> None:
        self.answer(307, b"", Location="/loop/")

    def do_chain(self, _: str) -> None:
        self.answer(302, b"", Location=self.path + "x")

    def do_tofile(self, _: str) -> None:
        self.answer(302, b"", Location="file:///etc/passwd")

    def do_nowhere(self, _: str) -> None:
        self.answer(302, b"")

    def do_tobad(self, _: str) -> None:
        self.answer(302, b"", Location="http://[broken/")

    def do_elsewhere(self, _: str) -> None:
        """To another host, which is the rest of the path."""
        host = self.path.split("/")[2]
        self.answer(302, b"", Location=self.server.url("ok/elsewhere", host))
