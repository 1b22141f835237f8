"""A hub on this machine's loopback address: what huggingface_hub asks for to push and to pull."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SHA = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """Keeps one repository in memory; every file goes into the commit itself."""

    def log_message(self, *_):
        pass

    def answer(self, value, status=200, headers=None):
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        state = self.server.state
        state["asked"].append(self.path)
        if self.path.endswith("/repos/create"):
            state["created"] = json.loads(body)
            self.answer({"url": f"{self.server.address}/me/digits"})
        elif self.path.endswith("/validate-yaml"):
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                part = json.loads(line)
                if part["key"] == "file":
                    value = part["value"]
                    state["files"][value["path"]] = base64.b64decode(value["content"])
                elif part["key"] == "header":
                    state["message"] = part["value"]["summary"]
            url = f"{self.server.address}/me/digits/commit/{SHA}"
            self.answer({"commitUrl": url, "commitOid": SHA, "hookOutput": ""})
        else:
            self.answer({"error": "unknown"}, 404)

    def do_GET(self):
        state = self.server.state
        state["asked"].append(self.path)
        state["tokens"].add(self.headers.get("Authorization"))
        path = self.path.split("?")[0]
        if "/resolve/" in path:
            content = state["files"].get(path.split(f"/resolve/{SHA}/")[-1])
            if content is None:
                self.answer({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound"})
                return
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            self.answer(content, headers={"ETag": etag, "X-Repo-Commit": SHA})
        elif path.startswith("/api/models/me/digits/tree/"):
            self.answer(
                [
                    {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                    for n, c in state["files"].items()
                ]
            )
        elif path.startswith("/api/models/me/digits"):
            files = [{"rfilename": name} for name in state["files"]]
            self.answer({"id": "me/digits", "sha": SHA, "siblings": files, "private": False})
        else:
            self.answer({"error": "not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET


@contextmanager
def fake_hub():
    """Yield the address of a hub, and what it was asked and given."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.state = {"files": {}, "asked": [], "tokens": set()}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.address, server.state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
