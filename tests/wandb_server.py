"""What W&B's client talks to over HTTP: as much as `wandb sync` and a saved workspace ask for, or a broken server."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal


class Server(ThreadingHTTPServer):
    """`asked`: the names of GraphQL's operations with their variables; `history`: {run: {number of a line: row}}."""

    daemon_threads = True

    def __init__(self, kind: Literal["whole", "failing", "silent"]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.kind = kind
        self.done = threading.Event()
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.history: dict[str, dict[int, dict[str, Any]]] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed, or give up, close their connections."""

    def answer(self, name: str, variables: dict[str, Any]) -> dict[str, Any]:
        self.asked.append((name, variables))
        project = {"id": "p", "name": "evolve", "entity": {"id": "e", "name": "someone"}}
        if name == "UpsertBucket":
            bucket = {"id": "b", "name": variables["name"], "displayName": variables["name"], "project": project}
            bucket |= {"description": None, "config": "{}", "sweepName": None, "historyLineCount": 0}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/upload"} for file in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        if name == "CreateArtifact":
            made = {"id": "a", "state": "COMMITTED", "artifactSequence": {"latestArtifact": {"id": "a"}}}
            return {"createArtifact": {"artifact": made}}
        if name == "UpsertView2":
            return {"upsertView": {"view": {"id": "v", "name": variables["name"]}, "inserted": True}}
        if name == "RunResumeStatus":
            return {"model": self._model(variables["name"])}
        return {"viewer": {"id": "u", "entity": "someone"}}

    def _model(self, run: str) -> dict[str, Any] | None:
        """A run that is there already, and how far."""
        if not (kept := self.history.get(run)):
            return None
        tail = json.dumps([json.dumps(kept[max(kept)])])
        bucket = {"id": "b", "name": run, "displayName": run, "summaryMetrics": "{}", "config": "{}", "tags": []}
        bucket |= {"logLineCount": 0, "historyLineCount": len(kept), "eventsLineCount": 0, "historyTail": tail}
        bucket |= {"eventsTail": "[]", "notes": None, "wandbConfig": '{"t": 1}'}
        return {"id": "p", "name": "evolve", "entity": {"id": "e", "name": "someone"}, "bucket": bucket}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.kind == "silent":
            self.server.done.wait()
            return
        answer: dict[str, Any] = {}
        if self.server.kind == "whole" and self.path == "/graphql":
            asked = json.loads(body)
            (name,) = re.match(r"\s*(?:query|mutation)\s+(\w+)", asked["query"]).groups()  # type: ignore[union-attr]
            answer = {"data": self.server.answer(name, asked.get("variables") or {})}
        elif self.server.kind == "whole" and self.path.endswith("/file_stream"):
            lines = json.loads(body).get("files", {}).get("wandb-history.jsonl")
            if lines:
                kept = self.server.history.setdefault(self.path.split("/")[-2], {})
                kept |= {lines["offset"] + place: json.loads(line) for place, line in enumerate(lines["content"])}
        said = json.dumps(answer).encode()
        self.send_response(200 if self.server.kind == "whole" else 500)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    do_GET = do_PUT = do_POST

    def log_message(self, format: str, *args: Any) -> None: ...


@contextlib.contextmanager
def serve(kind: Literal["whole", "failing", "silent"]) -> Iterator[Server]:
    with Server(kind) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.done.set()
            server.shutdown()
            thread.join()
