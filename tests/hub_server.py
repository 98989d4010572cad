"""A hub on this machine, for huggingface_hub's own client: one repository out of a folder, and some that refuse."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
REVISIONS = ("main", "v1", "refs/pr/3", COMMIT)


class Hub:
    """What was asked of the hub.

    Attributes:
      folder: of the repository.
      name: of it.
      fetched: names of the files whose bytes were sent.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name, self.fetched = folder, name, []

    def answer(self, method: str, path: str) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) of a request."""
        steps = [unquote(step) for step in urlsplit(path).path.strip("/").split("/")]
        api = steps[:2] == ["api", "models"]
        owner, name, *rest = steps[2:] if api else steps
        if name == "gated":
            return 403 if rest else 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"}, b"{}"
        if name == "broken":
            return 500, {}, b"oops"
        if f"{owner}/{name}" != self.name:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        revision = rest[1] if rest[1:] else "main"  # its slashes come quoted
        if revision not in REVISIONS:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if api:
            files = [file for file in sorted(self.folder.rglob("*")) if file.is_file()]
            about = [{"rfilename": file.relative_to(self.folder).as_posix(), "size": file.stat().st_size}
                     for file in files]  # fmt: skip
            info = {"id": self.name, "sha": COMMIT, "siblings": about}
            return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()
        file = self.folder.joinpath(*rest[2:])
        data = file.read_bytes()
        if method == "GET":
            self.fetched.append(file.relative_to(self.folder).as_posix())
        return 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}, data


@contextmanager
def served(folder: Path, name: str = "someone/wan"):
    """(address, hub) of a repository while the block runs."""
    hub = Hub(folder, name)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments) -> None:
            pass

        def do_GET(self) -> None:
            status, headers, body = hub.answer(self.command, self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
