"""Folders and hub repositories: the cache as the hub's client lays it out, and a hub that answers on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants

from phi2 import hub

COMMIT = "1" * 40
REPOSITORY = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"pickle",
    "run/a.json": b"{}",
}


class HubHandler(BaseHTTPRequestHandler):
    """The few answers of the hub's API that one download needs; `server.refusal` refuses everything."""

    def do_GET(self) -> None:
        if "/resolve/" in self.path:
            return self.answer(REPOSITORY[self.path.partition(f"/{COMMIT}/")[2]])
        if "/tree/" in self.path:
            rows = [{"type": "file", "path": p, "size": len(b), "oid": "2" * 40} for p, b in REPOSITORY.items()]
            return self.answer(json.dumps(rows).encode())
        return self.answer(json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": []}).encode())

    do_HEAD = do_GET

    def answer(self, body: bytes) -> None:
        status, code = self.server.refusal or (200, "")
        self.send_response(status)
        headers = {"ETag": '"tag"', "X-Repo-Commit": COMMIT, "X-Error-Code": code, "Content-Length": str(len(body))}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


def reach(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty hub cache, and no hub; whatever the caller's environment says of being offline."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    reach(monkeypatch, "http://127.0.0.1:1")
    return tmp_path / "hub"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    server.posted, server.refusal = [], None
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    reach(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()


def fill_cache(cache: Path) -> Path:
    """owner/name at its branch main, as the hub's client leaves it: blobs, links to them, the branch's commit."""
    repository = cache / "models--owner--name"
    for part in ("blobs", "refs", f"snapshots/{COMMIT}"):
        (repository / part).mkdir(parents=True)
    (repository / "blobs/tag").write_text("{}")
    (repository / "refs/main").write_text(COMMIT)
    (repository / f"snapshots/{COMMIT}/config.json").symlink_to("../../blobs/tag")
    return repository / f"snapshots/{COMMIT}"


def one_line_error(match: str, kind: type[Exception] = ValueError):
    return pytest.raises(kind, match=rf"\A[^\n]*{match}[^\n]*\Z")


def test_a_folder_is_itself(tmp_path):
    assert hub.resolve(tmp_path) == tmp_path


def test_a_folder_wins_over_the_hub_id_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("owner/name").mkdir(parents=True)
    assert hub.resolve("owner/name") == Path("owner/name")


@pytest.mark.parametrize("name", ["nano", "nano-instruct"])
def test_the_tiny_models_are_in_the_package(name):
    assert hub.resolve(name) == Path(hub.__file__).parent / "assets" / name


@pytest.mark.parametrize("name", ["/no/such/folder", "missing", "./a/b", "a/b/c", "../b", "owner/"])
def test_neither_a_folder_nor_a_hub_id(name, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with one_line_error(f"{name}: no such folder, and not a hub id", FileNotFoundError):
        hub.resolve(name)


def test_a_file_is_not_a_model(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with one_line_error("must be a folder"):
        hub.resolve(tmp_path / "model.safetensors")


def test_a_revision_of_a_folder_is_refused(tmp_path):
    with one_line_error("revision 'v1' needs a hub id"):
        hub.resolve(tmp_path, revision="v1")


def test_an_unknown_kind_lists_the_known_ones(tmp_path):
    with one_line_error("model, dataset, got 'space'"):
        hub.resolve(tmp_path, kind="space")


def test_a_cached_repository_needs_no_hub(cache):
    snapshot = fill_cache(cache)
    assert hub.resolve("owner/name") == snapshot


def test_a_commit_is_found_in_the_cache_offline(cache, monkeypatch):
    snapshot = fill_cache(cache)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.resolve("owner/name", revision=COMMIT) == snapshot


def test_offline_mode_uses_the_cache_and_nothing_else(cache, tmp_path):
    """In a process of its own: the hub's client reads its environment once, when it is imported."""
    fill_cache(cache)
    code = """
from phi2.hub import resolve
for name in ("owner/name", "owner/other"):
    try:
        print(resolve(name))
    except ValueError as error:
        print(error)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "PYTHONPATH": ":".join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    cached, missing = run.stdout.splitlines()
    assert cached.endswith(COMMIT) and missing.startswith("owner/other: no such folder")


def test_an_unreachable_hub_is_one_line():
    with one_line_error("owner/name: no such folder, and the hub is out of reach"):
        hub.resolve("owner/name")


def test_an_id_the_hub_would_never_accept_is_one_line():
    with one_line_error("a--b/name: "):
        hub.resolve("a--b/name")


@pytest.mark.parametrize(
    ("status", "code", "match"),
    [
        (404, "RepoNotFound", "no such repository"),
        (403, "GatedRepo", "gated"),
        (404, "RevisionNotFound", "no revision 'v9'"),
        (401, "", "401"),
        (500, "", "out of reach"),
    ],
)
def test_what_the_hub_refuses_is_one_line(server, status, code, match):
    server.refusal = (status, code)
    with one_line_error(f"owner/name: no such folder, and .*{match}"):
        hub.resolve("owner/name", revision="v9")


def test_only_what_a_model_needs_is_downloaded(server):
    folder = hub.resolve("owner/name")
    assert {str(p.relative_to(folder)) for p in folder.rglob("*")} == {"config.json", "model.safetensors"}
