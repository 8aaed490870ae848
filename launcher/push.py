"""Uploading the delivered model of a run, with its card, to the Hugging Face hub: only what is meant to be seen leaves the machine."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.masking import hide_places
from launcher.model_card import FILE as CARD
from launcher.model_card import has_own_tokenizer
from launcher.report_data import RunData, read_run
from launcher.report_text import without_paths
from launcher.storage import storage_of, telling
from trainers.errors import InputError, RunError, SetupError
from trainers.files import read_json

SENT = (
    CARD, "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "adapter_config.json", "merge.json",
    "eval.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "*.model", "chat_template.jinja", "LICENSE*", "NOTICE*",
)  # fmt: skip
"""Names of files of ``merged/`` that are uploaded. Everything else stays: rows and generations hold texts of the documents."""
_OURS = ("merge.json", "eval.json")
_PLACE_KEYS = re.compile(r"(^|_)(path|file|folder)$")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class SentFile:
    """A file of an upload.

    Args:
        name: in the repository.
        path: here.
        content: what is sent in place of the file's own bytes, without the places of this machine; None sends the file.
    """

    name: str
    path: Path
    content: bytes | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        return self.path.stat().st_size if self.content is None else len(self.content)


@dataclass(frozen=True)
class Parcel:
    """What an upload consists of.

    Args:
        files: that are sent.
        left_out: names of files beside them that are not.
        notes: what somebody should know before sending them.
    """

    files: tuple[SentFile, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]


def push_run(
    run: Path,
    *,
    repo: str,
    public: bool = False,
    dry_run: bool = False,
    revision: str | None = None,
    force: bool = False,
    api: Any = None,
    say: Callable[[str], None] = print,
) -> Parcel:
    """``unlearn push``: upload ``RUN/merged`` with its card in one commit, to a private repository unless told otherwise.

    The key comes from the environment (HF_TOKEN) or the hub's own login.

    Args:
        run: the run folder.
        repo: OWNER/NAME; made if there is none.
        public: for everybody to see.
        dry_run: list what would be sent, and send nothing.
        revision: branch; default: main.
        force: even a model that is judged dead.
        api: like ``huggingface_hub.HfApi``.
        say: told what is sent.

    Raises:
        InputError: if there is no finished model with a card, it is dead, or the repository is not as visible as was asked for.
        SetupError: without a key or a way to the hub.
        RunError: if the hub refuses.
    """
    if not _REPO.fullmatch(repo):
        raise InputError(f"{repo!r} is no name of a repository", where="--repo", fix="give OWNER/NAME, such as my-team/olmo-1b-unlearned")
    with telling():
        storage_of(Path(run)).pull("merged")
    parcel = pack(run, force=force)
    total = sum(file.size for file in parcel.files)
    kind = "public" if public else "private"
    say(f"{'would send' if dry_run else 'sending'} {Path(run) / 'merged'} to {repo}, {f'branch {revision}, ' if revision else ''}{kind}")
    width = max(len(file.name) for file in parcel.files)
    for file in parcel.files:
        hidden = "  without the places of this machine" if file.content is not None else ""
        say(f"  {file.name:<{width}}  {file_size(file.size):>10}{hidden}")
    say(f"  {len(parcel.files)} files, {file_size(total)}")
    if parcel.left_out:
        say(f"stays here: {', '.join(parcel.left_out)}")
    for note in parcel.notes:
        say(f"note: {note}")
    if dry_run:
        say("nothing was sent")
        return parcel
    url = _upload(parcel, repo=repo, public=public, revision=revision, message=f"Add the model of run {_name(run)}", api=api)
    say(f"sent to {url}")
    return parcel


def pack(run: Path, *, force: bool = False) -> Parcel:
    """What is uploaded of a run.

    Raises:
        InputError: if there is no finished model with a card, or it is dead and ``force`` is not given.
    """
    data = read_run(Path(run))
    merged = data.run / "merged"
    _check_finished(data, merged=merged, force=force)
    names = sorted(path.name for path in merged.iterdir() if path.is_file() and not path.name.startswith("."))
    sent = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in SENT)]
    return Parcel(
        files=tuple(SentFile(name, merged / name, _without_places(merged / name)) for name in sent),
        left_out=tuple(name for name in names if name not in sent),
        notes=tuple(_notes(data)),
    )


def file_size(size: int) -> str:
    """Bytes as people say them: ``512 bytes``, ``4.0 MiB``."""
    value, unit = float(size), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.1f} {_UNITS[unit]}" if unit else f"{size} bytes"


def _check_finished(data: RunData, *, merged: Path, force: bool) -> None:
    if not (merged / "merge.json").exists() or data.delivered is None:
        raise InputError(
            "the run has no finished model",
            where=str(merged),
            why="it ended without one, or it has not come to its end",
            fix="look at `unlearn status RUN`; the sweep's own command goes on where it stopped",
        )
    shards = read_json(merged / "merge.json").get("shards") or {"adapter_model.safetensors": {}}
    for name, facts in shards.items():
        file = merged / name
        if not file.exists() or file.stat().st_size != facts.get("bytes", file.stat().st_size):
            raise InputError(
                f"the weights in {name} are not those that were written",
                where=str(file),
                fix="remove merged/merge.json and run the sweep's command again",
            )
    if not (merged / CARD).exists():
        raise InputError("the model has no card", where=str(merged / CARD), fix="`unlearn report RUN` writes it")
    if (data.delivered.get("verdict") == "dead" or data.audit.get("verdict") == "dead") and not force:
        raise InputError(
            "the model is judged dead: its utility or what it should have kept is gone",
            where=str(merged),
            fix="search gentler settings; --force sends it as it is",
        )


def _notes(data: RunData) -> list[str]:
    """What speaks against handing the model out."""
    notes = []
    verdict, audit = str((data.delivered or {}).get("verdict")), str(data.audit.get("verdict"))
    if verdict in ("under-forgetting", "untouched"):
        notes.append(f"by its scores the model is {verdict}: documents of the forget set can still be found in it")
    if audit in ("hidden", "untouched"):
        notes.append(f"the audit's verdict is {audit}: attacks bring documents of the forget set back")
    elif not data.audit:
        notes.append("no audit was made: whether attacks bring the documents back is not known")
    if has_own_tokenizer(data):
        notes.append("the tokenizer was trained on the documents, so words of theirs, names among them, stand in tokenizer.json")
    return notes


def _without_places(path: Path) -> bytes | None:
    """The JSON file without folders of this machine; None where there are none."""
    if path.suffix != ".json" or path.name == "tokenizer.json" or path.name.endswith(".index.json"):
        return None
    value = read_json(path)
    hidden = _hide(value, everywhere=path.name in _OURS)
    return None if hidden == value else (json.dumps(hidden, indent=2, ensure_ascii=False) + "\n").encode()


def _hide(value: Any, *, everywhere: bool, key: str = "") -> Any:
    if isinstance(value, Mapping):
        return {name: _hide(item, everywhere=everywhere, key=str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [_hide(item, everywhere=everywhere, key=key) for item in value]
    if not isinstance(value, str):
        return value
    if _PLACE_KEYS.search(key):
        return hide_places(value)
    return without_paths(value) if everywhere else value


# ---- the hub


def _upload(parcel: Parcel, *, repo: str, public: bool, revision: str | None, message: str, api: Any) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    if not get_token():
        raise SetupError("no key for the hub on this machine", fix="set HF_TOKEN in the environment, or run `hf auth login`")
    api = api or HfApi(library_name="unlearn-ties")
    with _told(repo):
        try:
            info = api.repo_info(repo, repo_type="model")
        except RepositoryNotFoundError:
            api.create_repo(repo, repo_type="model", private=not public, exist_ok=False)
        else:
            _check_visibility(repo, is_private=bool(info.private), public=public)
        if revision is not None:
            api.create_branch(repo, repo_type="model", branch=revision, exist_ok=True)
        operations = [
            CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file.content if file.content is not None else str(file.path))
            for file in parcel.files
        ]
        # One commit: a repository never holds half of a model.
        commit = api.create_commit(repo, operations=operations, commit_message=message, repo_type="model", revision=revision)
    return str(getattr(commit, "commit_url", None) or repo)


def _check_visibility(repo: str, *, is_private: bool, public: bool) -> None:
    if is_private and public:
        raise InputError(
            "the repository is private, but --public was given",
            where=f"--repo {repo}",
            fix="leave --public out, or make it public in its settings on the hub",
        )
    if not is_private and not public:
        raise InputError(
            "the repository is public, and --public was not given",
            where=f"--repo {repo}",
            why="everybody could read what is sent",
            fix="name another repository, make this one private in its settings on the hub, or say --public",
        )


@contextmanager
def _told(repo: str) -> Iterator[None]:
    """Say what the hub answered, or that it did not."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        said = (str(getattr(error, "server_message", None) or error).strip().splitlines() or [""])[0]
        if status in (401, 403):
            raise SetupError(
                f"the hub refuses the key ({status})",
                where=repo,
                why=said,
                fix="use a key of the repository's owner that may write: HF_TOKEN in the environment, or `hf auth login`",
            ) from None
        raise RunError(
            f"the hub refused ({status})", where=repo, why=said, fix="nothing was half-sent; run the same command again"
        ) from None
    except Exception as error:
        if not _is_of_network(error):
            raise
        raise SetupError(
            "the hub cannot be reached",
            where=repo,
            why=(str(error).strip().splitlines() or [type(error).__name__])[0],
            fix="check the network (and HF_ENDPOINT, HF_HUB_OFFLINE), then run the same command again",
        ) from None


def _is_of_network(error: Exception) -> bool:
    """Whether an error comes from the connection; which library makes it depends on the hub client's release."""
    return isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.split(".")[0] in (
        "httpx", "httpx2", "httpcore", "requests", "urllib3",
    )  # fmt: skip


def _name(run: Path) -> str:
    return read_run(Path(run)).name
