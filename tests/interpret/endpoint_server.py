"""A local server of chat completions that behaves as it is told, reply by reply."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def says(content, tokens=7, **message):
    """The body of a good reply."""
    return json.dumps(
        {"choices": [{"message": {"content": content, **message}}], "usage": {"total_tokens": tokens}}
    ).encode()


class Reply:
    """What is sent back: `cut` bytes less than promised, after `delay` seconds, dripping with `drip` seconds per byte."""

    def __init__(self, body=b"", status=200, headers=(), cut=0, delay=0.0, drip=0.0, drop=False):
        self.body = body if isinstance(body, bytes) else body.encode()
        self.status, self.headers, self.drop = status, dict(headers), drop
        self.cut, self.delay, self.drip = cut, delay, drip


class Server:
    """Keeps what it was asked; `answer(body) -> Reply` decides, and so does each of `first` once."""

    def __init__(self, answer, first):
        self.answer, self.first = answer, list(first)
        self.bodies, self.headers = [], []
        self.lock = threading.Lock()
        self.running = self.most_running = 0

    @property
    def prompts(self):
        return [body["messages"][0]["content"] for body in self.bodies]

    def reply(self, body, headers):
        with self.lock:
            self.bodies.append(body)
            self.headers.append(headers)
            return self.first.pop(0) if self.first else self.answer(body)

    def count(self, by):
        with self.lock:
            self.running += by
            self.most_running = max(self.running, self.most_running)


@contextmanager
def serving(answer=lambda body: Reply(says("{}")), first=()):
    """Serves on a free port; gives the `Server`, whose `url` is to be asked."""
    server = Server(answer, first)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            server.count(1)
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            reply = server.reply(body, dict(self.headers))
            time.sleep(reply.delay)
            server.count(-1)
            if reply.drop:
                self.connection.close()
                return
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(reply.body)))
            self.end_headers()
            sent = reply.body[: len(reply.body) - reply.cut]
            for part in [sent] if not reply.drip else [sent[i : i + 1] for i in range(len(sent))]:
                self.wfile.write(part)
                self.wfile.flush()
                time.sleep(reply.drip)

        def log_message(self, *_):
            pass

    http_server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http_server.daemon_threads = True
    http_server.handle_error = lambda *_: None  # clients go away
    thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    server.url = f"http://127.0.0.1:{http_server.server_port}/v1"
    try:
        yield server
    finally:
        http_server.shutdown()
        http_server.server_close()
        thread.join()
