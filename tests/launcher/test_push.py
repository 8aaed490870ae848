"""Uploading a model: only what is meant to be seen, private unless told otherwise, and nothing at all where something is wrong."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.cli import main
from launcher.model_card import write_model_card
from launcher.push import SENT, file_size, pack, push_run
from tests.helpers.run_folder import build_finished
from trainers.errors import InputError, RunError, SetupError
from trainers.files import read_json, write_json

KEY = "hf_" + "x" * 30
WEIGHTS = b"\x08\0\0\0\0\0\0\0{}      " + b"\1" * 100


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key in the environment, and no other one of this machine."""
    monkeypatch.setenv("HF_TOKEN", KEY)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with weights, a tokenizer, a card and everything else that may lie in ``merged/``."""
    run = build_finished(tmp_path_factory.mktemp("push") / "run")
    merged = run / "merged"
    (merged / "model.safetensors").write_bytes(WEIGHTS)
    record = read_json(merged / "merge.json") | {
        "base": {"path": "/home/me/target", "bytes": 1},
        "shards": {"model.safetensors": {"bytes": len(WEIGHTS)}},
        "notes": ["read from /home/me/target on that day"],
    }
    write_json(merged / "merge.json", record)
    write_json(merged / "config.json", {"model_type": "olmo", "_name_or_path": "/home/me/target"})
    write_json(merged / "tokenizer.json", {"model": {"vocab": {"/a/b/c": 1}}})
    write_json(merged / "tokenizer_config.json", {"eos_token": "<|endoftext|>", "chat_template": "{% if a/b/c %}"})
    for name in ("target-manifest.json", "notes.txt", "report.html", "modeling_own.py", "optimizer.pt", ".hidden.json"):
        (merged / name).write_text("{}")
    write_model_card(run, merged)
    return run


@pytest.fixture
def run(built: Path, tmp_path: Path) -> Path:
    """A copy of it, which a test may damage."""
    return shutil.copytree(built, tmp_path / "run")


class RecordingApi:
    """In place of ``huggingface_hub.HfApi``: remembers what it was asked for; the repository exists where ``private`` is not None."""

    def __init__(self, *, private: bool | None = None, error: Exception | None = None) -> None:
        self.private, self.error = private, error
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def repo_info(self, repo: str, **options: Any) -> Any:
        if self.private is None:
            from huggingface_hub.errors import RepositoryNotFoundError

            raise RepositoryNotFoundError("404", response=answer(404))
        return SimpleNamespace(private=self.private)

    def create_repo(self, repo: str, **options: Any) -> None:
        self.calls.append(("create_repo", {"repo": repo, **options}))

    def create_branch(self, repo: str, **options: Any) -> None:
        self.calls.append(("create_branch", {"repo": repo, **options}))

    def create_commit(self, repo: str, *, operations: Any, **options: Any) -> Any:
        if self.error is not None:
            raise self.error
        files = {}
        for operation in operations:
            given = operation.path_or_fileobj
            files[operation.path_in_repo] = given if isinstance(given, bytes) else Path(given).read_bytes()
        self.calls.append(("create_commit", {"repo": repo, "files": files, **options}))
        return SimpleNamespace(commit_url=f"https://hub.example/{repo}/commit/1")

    @property
    def files(self) -> dict[str, bytes]:
        """What was uploaded."""
        (commit,) = [options for name, options in self.calls if name == "create_commit"]
        return commit["files"]

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


def answer(status: int) -> Any:
    """An answer of the hub, as its client's errors carry it."""
    from huggingface_hub.errors import HfHubHTTPError

    library = __import__(HfHubHTTPError.__mro__[1].__module__.split(".")[0])
    return library.Response(status, request=library.Request("GET", "https://hub.example")) if hasattr(library, "Request") else None


def push(run: Path, **options: Any) -> RecordingApi:
    api = options.pop("api", None) or RecordingApi()
    push_run(run, repo="team/model", api=api, say=lambda text: None, **options)
    return api


# ---- what is sent


def test_exactly_the_model_its_tokenizer_and_its_card_are_sent(run: Path) -> None:
    """No rows, no page, no pickles, no code, nothing hidden; and no file that this list does not know."""
    files = push(run).files
    assert sorted(files) == [
        "README.md", "config.json", "eval.json", "merge.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert files["model.safetensors"] == WEIGHTS
    assert files["README.md"] == (run / "merged" / "README.md").read_bytes()
    left = pack(run).left_out
    assert {"eval-rows.jsonl", "validation-rows.jsonl", "validation.json", "report.html", "modeling_own.py", "optimizer.pt"} <= set(left)
    assert not any(pattern in ("*", "*.json", "*.jsonl", "*.html", "*.py") for pattern in SENT)


def test_no_personal_data_and_no_place_of_the_machine_leave_it(run: Path) -> None:
    """The control: both are in what stays here."""
    sent = b"".join(push(run).files.values())
    for private in (b"900123456", b"900-12-3456", b"Elm Street", b"/home/me", str(run).encode()):
        assert private not in sent
    assert b"900123456" in (run / "merged" / "eval-rows.jsonl").read_bytes()
    assert b"/home/me" in (run / "merged" / "merge.json").read_bytes()


def test_only_places_are_taken_out_of_what_the_model_needs(run: Path) -> None:
    """A tokenizer's words and a chat template hold slashes, too."""
    files = push(run).files
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert files[name] == (run / "merged" / name).read_bytes()
    assert json.loads(files["config.json"]) == {"model_type": "olmo", "_name_or_path": "…/target"}
    record = json.loads(files["merge.json"])
    assert record["base"] == {"path": "…/target", "bytes": 1}
    assert record["formula"] == read_json(run / "merged" / "merge.json")["formula"]


def test_the_repository_is_private_unless_public_is_said(run: Path) -> None:
    for options, private in (({}, True), ({"public": True}, False)):
        (made,) = [facts for name, facts in push(run, **options).calls if name == "create_repo"]
        assert made == {"repo": "team/model", "repo_type": "model", "private": private, "exist_ok": False}


def test_an_existing_repository_is_used_only_if_it_is_as_visible_as_was_asked_for(run: Path) -> None:
    assert push(run, api=RecordingApi(private=True)).names == ["create_commit"]
    assert push(run, api=RecordingApi(private=False), public=True).names == ["create_commit"]
    for private, public, sentence in ((False, False, "the repository is public"), (True, True, "the repository is private")):
        api = RecordingApi(private=private)
        with pytest.raises(InputError, match=sentence):
            push(run, api=api, public=public)
        assert api.calls == []


def test_everything_goes_in_one_commit_to_the_branch_that_was_named(run: Path) -> None:
    api = push(run, revision="trial-2")
    assert api.names == ["create_repo", "create_branch", "create_commit"]
    assert api.calls[1][1]["branch"] == "trial-2"
    assert api.calls[2][1]["revision"] == "trial-2"
    assert push(run).calls[-1][1]["revision"] is None


def test_the_files_and_their_size_are_listed_first(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    push_run(run, repo="team/model", api=RecordingApi())
    lines = capsys.readouterr().out.splitlines()
    total = sum(file.size for file in pack(run).files)
    assert lines[0].endswith("to team/model, private")
    assert any(line.split() == ["model.safetensors", str(len(WEIGHTS)), "bytes"] for line in lines)
    assert f"  7 files, {file_size(total)}" in lines
    assert lines[-1] == "sent to https://hub.example/team/model/commit/1"
    assert [file_size(size) for size in (0, 1023, 1024, 5 * 1024**2, 3 * 1024**4)] == [
        "0 bytes",
        "1023 bytes",
        "1.0 KiB",
        "5.0 MiB",
        "3.0 TiB",
    ]


def test_a_dry_run_sends_nothing_and_needs_no_key(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: pytest.fail("it looked for a key"))
    said: list[str] = []
    api = RecordingApi()
    parcel = push_run(run, repo="team/model", dry_run=True, api=api, say=said.append)
    assert api.calls == []
    assert said[0].startswith("would send")
    assert said[-1] == "nothing was sent"
    assert len(parcel.files) == 7


def test_what_speaks_against_handing_it_out_is_said(run: Path) -> None:
    assert pack(run).notes == ("no audit was made: whether attacks bring the documents back is not known",)
    write_json(run / "audit.json", {"verdict": "hidden"})
    assert any("the audit's verdict is hidden" in note for note in pack(run).notes)
    write_json(run / "audit.json", {"verdict": "gone"})
    assert pack(run).notes == ()
    judged(run, "under-forgetting")
    assert any("under-forgetting: documents" in note for note in pack(run).notes)


# ---- refused


def judged(run: Path, verdict: str) -> None:
    results = read_json(run / "results.json")
    for model in results["models"]:
        model["verdict"] = verdict if model["name"] == "merged" else model["verdict"]
    write_json(run / "results.json", results)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda run: (run / "merged" / "merge.json").unlink(), "no finished model"),
        (lambda run: (run / "results.json").unlink(), "no finished model"),
        (lambda run: (run / "merged" / "README.md").unlink(), "no card"),
        (lambda run: (run / "merged" / "model.safetensors").unlink(), "not those that were written"),
        (lambda run: (run / "merged" / "model.safetensors").write_bytes(WEIGHTS[:-1]), "not those that were written"),
        (lambda run: judged(run, "dead"), "judged dead"),
        (lambda run: write_json(run / "audit.json", {"verdict": "dead"}), "judged dead"),
    ],
    ids=["no manifest", "no results", "no card", "no weights", "half of the weights", "dead", "dead by the audit"],
)
def test_an_unfinished_or_dead_model_is_refused_before_anybody_is_asked(run: Path, damage: Any, sentence: str) -> None:
    push(run)  # as it is, it goes
    damage(run)
    api = RecordingApi()
    with pytest.raises(InputError, match=sentence):
        push(run, api=api)
    assert api.calls == []


def test_a_dead_model_goes_only_by_force(run: Path) -> None:
    judged(run, "dead")
    assert push(run, force=True).names[-1] == "create_commit"


@pytest.mark.parametrize("repo", ["model", "a/b/c", "/model", "team/", "team/mo del", "https://hub.example/team/model"])
def test_a_name_that_is_no_repository_is_refused(run: Path, repo: str) -> None:
    with pytest.raises(InputError, match="no name of a repository"):
        push_run(run, repo=repo, api=RecordingApi(), say=lambda text: None)


def test_without_a_key_the_command_ends_with_3_and_says_where_keys_come_from(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(SystemExit) as caught:
        main(["push", str(run), "--repo", "team/model"])
    captured = capsys.readouterr()
    assert caught.value.code == 3
    assert "HF_TOKEN" in captured.err
    assert "Traceback" not in captured.err


def test_no_option_takes_a_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["push", "--help"])
    options = {word for word in capsys.readouterr().out.split() if word.startswith("--")}
    assert options == {"--repo", "--public", "--dry-run", "--revision", "--force", "--help"}


def test_a_hub_that_refuses_or_does_not_answer_is_told_in_words(run: Path) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    for error, kind, sentence in (
        (HfHubHTTPError("Forbidden: no right to write", response=answer(403)), SetupError, r"refuses the key \(403\)"),
        (HfHubHTTPError("Internal error", response=answer(500)), RunError, r"the hub refused \(500\)"),
        (ConnectionRefusedError("connection refused"), SetupError, "cannot be reached"),
    ):
        with pytest.raises(kind, match=sentence):
            push(run, api=RecordingApi(private=True, error=error))
    with pytest.raises(ZeroDivisionError):  # a mistake of ours is not blamed on the network
        push(run, api=RecordingApi(private=True, error=ZeroDivisionError()))


# ---- over the wire


class Hub(ThreadingHTTPServer):
    """A hub on this machine that has no repositories yet and takes every file in the commit itself."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.seen: list[tuple[str, str, bytes, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class HubRequest(BaseHTTPRequestHandler):
    """One request to it."""

    server: Hub

    def do_GET(self) -> None:
        self._seen()
        self._answer({"error": "Repository not found"}, status=404, headers={"X-Error-Code": "RepoNotFound"})

    def do_POST(self) -> None:
        body = self._seen()
        if self.path.endswith("/repos/create"):
            self._answer({"url": f"{self.server.url}/team/model", "name": "team/model"})
        elif "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            self._answer({"files": files})
        else:
            self._answer({"commitUrl": f"{self.server.url}/team/model/commit/1", "commitOid": "1", "success": True})

    def _seen(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            body = b"".join(parts)
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.seen.append((self.command, self.path, body, self.headers.get("Authorization")))
        return body

    def _answer(self, value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_hubs_own_client_makes_a_private_repository_and_sends_these_files(run: Path, hub: Hub) -> None:
    """The real client against a hub on this machine: what goes over the wire, with the key of the environment and no other address."""
    from huggingface_hub import HfApi

    push_run(run, repo="team/model", api=HfApi(endpoint=hub.url), say=lambda text: None)
    assert {authorization for *_, authorization in hub.seen} == {f"Bearer {KEY}"}
    (made,) = [json.loads(body) for method, path, body, _ in hub.seen if path.endswith("/repos/create")]
    assert made.get("visibility") == "private" or made.get("private") is True, made  # by the client's release
    assert (made["name"], made["organization"]) == ("model", "team")
    (commit,) = [body for method, path, body, _ in hub.seen if "/commit/" in path]
    lines = [json.loads(line) for line in commit.splitlines()]
    sent = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"}
    assert sorted(sent) == sorted(file.name for file in pack(run).files)
    assert sent["model.safetensors"] == WEIGHTS
    assert b"900123456" not in b"".join(body for _, _, body, _ in hub.seen)
