"""A small server with the Hub's protocol: repositories, commits, branches, large files, tokens, and faults."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_right"


class HubServer(ThreadingHTTPServer):
    """
    Listens on a local port while it is used as a context manager.

    Attributes:
        repos (`dict`): by id: `private`, `branches` (name to commit) and `commits` (id to files by path).
        requests (`list[str]`): method and path of all requests so far.
        breaks (`int`): number of downloads that will be interrupted half-way.
        truncates (`bool`): whether files are sent without their last bytes.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.breaks, self.truncates = 0, False

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def commit(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        repository = self.repos.setdefault(repo, {"private": False, "branches": {}, "commits": {}})
        before = repository["commits"].get(repository["branches"].get(branch), {})
        after = before | files
        sha = hashlib.sha1(repr([branch, len(repository["commits"]), sorted(after.items())]).encode()).hexdigest()
        repository["commits"][sha], repository["branches"][branch] = after, sha
        return sha


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.route()

    do_HEAD = do_POST = do_PUT = do_GET

    def route(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self.read_chunks()
        path = unquote(urlsplit(self.path).path)
        for pattern, handle in ROUTES:
            if match := re.fullmatch(pattern, path):
                return handle(self, *match.groups())
        return self.fail(404, "no such address")

    def read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    @property
    def authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def send(self, body: bytes = b"", status: int = 200, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def reply(self, value, status: int = 200) -> None:
        self.send(json.dumps(value).encode(), status, Content_Type="application/json")

    def fail(self, status: int, message: str, code: str = "") -> None:
        self.send(json.dumps({"error": message}).encode(), status, X_Error_Code=code, X_Error_Message=message)

    def find(self, repo: str, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        """Commit and files, or `None` after an error response."""
        token = self.headers.get("Authorization")
        repository = self.server.repos.get(repo)
        if token is not None and not self.authorised:
            return self.fail(401, "Invalid credentials in Authorization header")
        if repository is None or (repository["private"] and not self.authorised):
            return self.fail(404 if self.authorised else 401, "Repository not repository", "RepoNotFound")
        sha = repository["branches"].get(revision or "main", revision)
        if sha not in repository["commits"]:
            return self.fail(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repository["commits"][sha]

    def create(self) -> None:
        if not self.authorised:
            return self.fail(401, "Invalid username or password.")
        asked = json.loads(self.body)
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        status = 409 if repo in self.server.repos else 200
        if status == 200:
            self.server.commit(repo, {".gitattributes": b""})
            self.server.repos[repo]["private"] = asked.get("visibility") == "private" or bool(asked.get("private"))
        return self.reply({"url": f"{self.server.endpoint}/{repo}", "name": repo, "id": repo}, status)

    def branch(self, repo: str, name: str) -> None:
        if not self.authorised:
            return self.fail(401, "Invalid username or password.")
        branches = self.server.repos[repo]["branches"]
        if name in branches:
            return self.fail(409, "Reference already exists")
        branches[name] = branches["main"]
        return self.reply({})

    def preupload(self, repo: str, revision: str) -> None:
        if self.find(repo, revision) is not None:
            files = json.loads(self.body)["files"]
            modes = ["lfs" if file["path"].endswith(".safetensors") else "regular" for file in files]
            self.reply(
                {
                    "files": [
                        {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
                        for file, mode in zip(files, modes, strict=True)
                    ]
                }
            )

    def batch(self, repo: str) -> None:
        objects = json.loads(self.body)["objects"]
        action = {"upload": {"href": f"{self.server.endpoint}/large/", "header": {}}}
        for entry in objects:
            entry["actions"] = {"upload": {**action["upload"], "href": action["upload"]["href"] + entry["oid"]}}
        self.reply({"transfer": "basic", "objects": objects})

    def put_large(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.fail(400, "not what was announced")
        self.server.large[oid] = self.body
        return self.send()

    def make_commit(self, repo: str, revision: str) -> None:
        if not self.authorised:
            return self.fail(401, "Invalid username or password.")
        files = {}
        for line in map(json.loads, self.body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
        sha = self.server.commit(repo, files, revision)
        url = f"{self.server.endpoint}/{repo}/commit/{sha}"
        return self.reply({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def info(self, repo: str, revision: str | None = None) -> None:
        if (commit := self.find(repo, revision)) is not None:
            sha, files = commit
            siblings = [{"rfilename": name} for name in sorted(files)]
            private = self.server.repos[repo]["private"]
            self.reply({"_id": sha, "id": repo, "sha": sha, "siblings": siblings, "private": private, "tags": []})

    def tree(self, repo: str, revision: str, folder: str | None = None) -> None:
        if (commit := self.find(repo, revision)) is not None:
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in sorted(commit[1].items())
                if folder is None or name.startswith(f"{folder}/")
            ]
            self.reply(entries)

    def file(self, repo: str, revision: str, name: str) -> None:
        if (commit := self.find(repo, revision)) is None:
            return None
        sha, files = commit
        if name not in files:
            return self.fail(404, "Entry not commit", "EntryNotFound")
        content = files[name]
        etag = hashlib.sha256(content).hexdigest()
        if self.server.truncates:
            content = content[:-7]
        start = int((re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "") or [0, 0])[1])
        headers = {"ETag": f'"{etag}"', "X_Repo_Commit": sha, "Accept_Ranges": "bytes"}
        status = 200
        if start:
            status = 206
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if self.command == "GET" and self.server.breaks and name.endswith(".safetensors"):
            self.server.breaks -= 1
            self.send_response(status)
            for key, value in (headers | {"Content_Length": str(len(content) - start)}).items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(content[start : start + (len(content) - start) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return None
        return self.send(content[start:], status, **headers)


REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (r"/api/repos/create", Handler.create),
    (r"/api/validate-yaml", lambda self: self.reply({"errors": [], "warnings": []})),
    (
        r"/api/whoami-v2",
        lambda self: self.reply({"name": "me", "orgs": []}) if self.authorised else self.fail(401, ""),
    ),
    (rf"/api/models/{REPO}/branch/(.+)", Handler.branch),
    (rf"/api/models/{REPO}/preupload/(.+)", Handler.preupload),
    (rf"/api/models/{REPO}/commit/(.+)", Handler.make_commit),
    (rf"/api/models/{REPO}/tree/([^/]+)(?:/(.+))?", Handler.tree),
    (rf"/api/models/{REPO}(?:/revision/(.+))?", Handler.info),
    (rf"/{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    (r"/large/(\w+)", Handler.put_large),
    (rf"/{REPO}/resolve/([^/]+)/(.+)", Handler.file),
]
