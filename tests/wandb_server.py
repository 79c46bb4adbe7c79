"""As much of a wandb server as the real client needs to upload a run: it keeps the rows of each run's history."""

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class WandbServer:
    """Listens on this machine until closed. `history[run_id]` maps a row's line number to the row, as uploaded."""

    def __init__(self):
        self.history, self.runs = {}, {}
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                answer = json.dumps(server.answer(self.path, body)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_PUT = do_GET = do_POST

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def rows(self, run_id: str) -> list[dict]:
        """The rows of a run in the order of their lines, without what wandb adds to each."""
        lines = self.history[run_id]
        assert sorted(lines) == list(range(len(lines)))  # no hole
        return [{k: v for k, v in lines[i].items() if k[0] != "_"} for i in sorted(lines)]

    def answer(self, path: str, body: bytes) -> dict:
        if path.endswith("/file_stream"):
            run_id = path.split("/")[-2]
            for name, part in (json.loads(body).get("files") or {}).items():
                if name == "wandb-history.jsonl":
                    for i, line in enumerate(part["content"], part["offset"]):
                        self.history.setdefault(run_id, {})[i] = json.loads(line)
            return {}
        if path != "/graphql":
            return {}
        asked = json.loads(body)
        given = asked.get("variables") or {}
        known = {
            "RunResumeStatus": self.resume_status,
            "UpsertBucket": self.upsert,
            "CreateRunFiles": self.run_files,
        }
        return {"data": known.get(asked.get("operationName"), lambda given: {})(given)}

    def resume_status(self, given: dict) -> dict:
        if given["name"] not in self.runs:
            return {"model": None}
        lines = self.history.get(given["name"], {})
        bucket = self.runs[given["name"]] | {
            "historyLineCount": len(lines),
            "historyTail": json.dumps([json.dumps(lines[max(lines)])] if lines else []),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "eventsTail": "[]",
            "summaryMetrics": json.dumps(lines[max(lines)] if lines else {}),
            "config": "{}",
            "wandbConfig": json.dumps({"t": 1}),
        }
        return {"model": {"bucket": bucket}}

    def upsert(self, given: dict) -> dict:
        run_id = given.get("name") or next(i for i, r in self.runs.items() if r["id"] == given["id"])
        project = {"id": "p", "name": given.get("project") or "p", "entity": {"id": "e", "name": "someone"}}
        run = self.runs.setdefault(run_id, {"id": f"id-{run_id}", "name": run_id, "project": project})
        run |= {k: given[k] for k in ("displayName", "groupName", "jobType", "tags") if given.get(k)}
        return {"upsertBucket": {"bucket": run, "inserted": True}}

    def run_files(self, given: dict) -> dict:
        files = [{"name": f, "uploadUrl": f"{self.url}/upload"} for f in given["files"]]
        return {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": files}}
