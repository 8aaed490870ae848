"""The home of a run under a URI, and the working copy that each machine keeps of it.

A run in a folder, local or mounted, is its own home: nothing is copied.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeVar

from launcher.lock import hold
from launcher.storage_place import is_uri, join_uri, redacted, uri_problem, working_copy
from launcher.transfer import Transfer, plan_transfer
from trainers.errors import InputError, SetupError
from trainers.files import OPTIMIZER, read_json, write_json, write_text
from trainers.patience import check_mounted, patience_s, patiently, storage_limit_s

T = TypeVar("T")
HOME = ".home"
"""Folder of a working copy that says where its home is, and what was alike at the last look."""
LOCK_S = 3600.0
"""Seconds to wait for another process of this machine that copies: a checkpoint may be large."""
BLOCK_BYTES = 8 << 20
RACY_S, RACY_BYTES = 60.0, 1 << 20
"""Where times have whole seconds, a small file that was written this recently may have changed again without a sign."""
OBJECT_STORES = ("s3", "gcs", "abfs")
"""File systems whose files appear whole or not at all; elsewhere a file is renamed into its place."""
DENIED = ("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "INVALID_CLIENT_TOKEN_ID", "UNRECOGNIZED_CLIENT",
          "NO_SUCH_BUCKET", "EXPIRED_TOKEN", "INVALID_BUCKET_NAME")  # fmt: skip
"""Words of the AWS library for what waiting does not mend. https://github.com/aws/aws-sdk-cpp/blob/main/src/aws-cpp-sdk-core/include/aws/core/client/CoreErrors.h"""
RESUME_ONLY = (OPTIMIZER,)
"""Files that only the process which trains a trial reads."""
WEIGHTS = (".safetensors",)
OWN = "."
"""In place of a path: the files of a run without its trials."""
TRIAL_INPUTS = ("sweep.json", "experiment.json", "data", "inputs", "target", "target.json", "reference", "plugins")


class StorageUnreachable(OSError):
    """The home did not answer for as long as there was patience; it may later."""


class Storage(Protocol):
    """Copies between a run's folder and its home."""

    def push(self, *paths: str) -> None:
        """Bring files or folders of the run, or all of it, to its home."""

    def pull(self, *paths: str, exact: Collection[str] = (), skip: tuple[str, ...] = ()) -> None:
        """Fetch files or folders of the run, or all of it, from its home."""


class OwnHome:
    """The storage of a run whose folder is its home: nothing is to be done."""

    def push(self, *paths: str) -> None:
        """Nothing."""

    def pull(self, *paths: str, exact: Collection[str] = (), skip: tuple[str, ...] = ()) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Stored:
    """A file of the home: bytes, and when it was written, ns."""

    size: int
    mtime_ns: int | None


@dataclass(frozen=True)
class Known:
    """A file that was alike here and in its home.

    Args:
        local: size, time of change and number of the file here.
        home: the file there; None if it is not known.
        seen: when that was, unix seconds.
    """

    local: tuple[int, int, int]
    home: Stored | None
    seen: float

    @property
    def is_certain(self) -> bool:
        """Whether both sides were alike: else a copy was begun, and nothing says how far it came."""
        return self.local[0] >= 0

    def is_home(self, stored: Stored) -> bool:
        """Whether the home surely holds what it held then."""
        if self.home != stored or stored.mtime_ns is None:
            return False
        whole_seconds = stored.mtime_ns % 1_000_000_000 == 0
        return not (whole_seconds and stored.size <= RACY_BYTES and self.seen - stored.mtime_ns / 1e9 < RACY_S)


BEGUN = Known(local=(-1, 0, 0), home=None, seen=0.0)


class RunStorage:
    """A working copy and its home.

    Files that did not change since they were last alike are not copied again; how that was lies in ``.home/``, by trial, and without it
    everything is copied. The home is right: where both sides changed, its file replaces the one here.

    Args:
        folder: the working copy.
        uri: the home, without keys.
        filesystem: of pyarrow, for tests; else what the URI says.
    """

    def __init__(self, folder: Path, *, uri: str, filesystem: tuple[Any, str] | None = None) -> None:
        self.folder, self.uri = Path(folder), uri
        self._filesystem = filesystem

    def push(self, *paths: str) -> None:
        """Bring what changed here to the home; with no path all of the run.

        Raises:
            StorageUnreachable: if the home does not answer.
            SetupError: if it refuses.
        """
        self._each_scope(paths or ("",), self._push_scope, found=self._local_trials)

    def pull(self, *paths: str, exact: Collection[str] = (), skip: tuple[str, ...] = ()) -> None:
        """Fetch what changed in the home; with no path all of the run.

        Args:
            paths: files or folders of the run.
            exact: folders among them in which nothing stays here that the home does not hold.
            skip: endings of files to leave there.

        Raises:
            StorageUnreachable: if the home does not answer.
            SetupError: if it refuses, or has lost what was brought there.
        """
        listed = time.time()
        listing = {name: stored for name, stored in self._listing(paths or ("",)).items() if not name.endswith(skip or ("\0",))}
        if not listing:
            self._refuse_loss(paths or ("",))

        def pull_scope(scope: str, inside: tuple[str, ...]) -> None:
            self._pull_scope(scope, inside, listing=listing, listed=listed, exact=tuple(exact), skip=skip)

        self._each_scope(paths or ("",), pull_scope, found=lambda: {_scope(name) for name in listing} | self._local_trials())

    def send_signs(self, paths: Collection[str]) -> None:
        """Bring hidden files home, and remove there those that are not here; each is a few bytes."""
        fs, root = self._open()
        there = self._ask(lambda: fs.get_file_info([f"{root}/{path}" for path in paths]))
        for path, info in zip(paths, there, strict=True):
            if (self.folder / path).exists():
                if info.type.name == "NotFound":
                    self._put(path)
            elif info.type.name != "NotFound":
                self._remove_there(path)

    def read_signs(self, paths: Collection[str]) -> None:
        """Fetch hidden files, and remove those here that were fetched and are not in the home any more.

        Where the sender works, its own are left alone: it may not have brought them home yet.
        """
        fs, root = self._open()
        record = self.folder / HOME / "signs.json"
        before: list[str] = read_json(record) if record.exists() else []
        fetched = set(before)
        for path, info in zip(paths, self._ask(lambda: fs.get_file_info([f"{root}/{path}" for path in paths])), strict=True):
            if info.type.name == "NotFound" and path in fetched:
                (self.folder / path).unlink(missing_ok=True)
                fetched.remove(path)
            elif info.type.name != "NotFound" and not (self.folder / path).exists():
                self._get(path, stored=Stored(info.size, info.mtime_ns))
                fetched.add(path)
        if fetched != set(before):
            write_json(record, sorted(fetched))

    def exists(self) -> bool:
        """Whether the home holds anything.

        Raises:
            StorageUnreachable: if it does not answer.
            SetupError: if it refuses.
        """
        from pyarrow.fs import FileType

        fs, root = self._open()
        return bool(self._ask(lambda: fs.get_file_info(root).type != FileType.NotFound))

    # ---- one trial, or the rest of the run, at a time: trials that run side by side do not wait for each other

    def _each_scope(self, paths: tuple[str, ...], act: Callable[[str, tuple[str, ...]], None], *, found: Callable[[], set[str]]) -> None:
        scopes = found() | {""} if any(path in ("", "trials") for path in paths) else {_scope(path) for path in paths}
        # The run's own files speak of the trials.
        for scope in sorted(scopes, reverse=True):
            inside = tuple(path for path in paths if _scope(path) == scope or path in ("", "trials"))
            with hold(self.folder / HOME / f"{scope.replace('/', '-') or 'run'}.lock", wait_s=LOCK_S):
                act(scope, tuple(scope if path in ("", "trials") else path for path in inside))

    def _push_scope(self, scope: str, paths: tuple[str, ...]) -> None:
        index = self._read_index(scope)
        local = self._local(paths, scope=scope)
        if index is None:
            known: dict[str, Known] = {}
            present = set(self._listing(paths))
        else:
            known, present = index, set(index)
        gone = (
            set()
            if index is None or not local
            else {name for name, entry in known.items() if entry.is_certain and _within(name, paths) and name not in local}
        )
        changed = {name for name, stamp in local.items() if name not in known or known[name].local != stamp}
        transfer = plan_transfer(changed=changed, gone=gone, present=present, source=local)
        self._carry_out(transfer, known, scope=scope, copy=self._put, remove=self._remove_there)

    def _pull_scope(
        self,
        scope: str,
        paths: tuple[str, ...],
        *,
        listing: dict[str, Stored],
        listed: float,
        exact: tuple[str, ...],
        skip: tuple[str, ...],
    ) -> None:
        there = {name: stored for name, stored in listing.items() if _scope(name) == scope}
        local = self._local(paths, scope=scope)
        known = self._read_index(scope) or {}
        if known and not local and _whole(paths, scope):
            known = {}  # the working copy was thrown away
        strict = {name for name in {*there, *local} if _within(name, exact)}

        # Another process of this machine may have copied since the home was listed.
        settled = {name for name, entry in known.items() if entry.seen >= listed}

        def is_new(name: str) -> bool:
            entry = known.get(name)
            if entry is None or name in settled:
                return entry is None
            return not entry.is_home(there[name]) or (name in strict and local.get(name) != entry.local)

        def is_gone(name: str) -> bool:
            if name in there or name in settled or name.endswith(skip or ("\0",)):
                return False
            return name in strict or (name in known and known[name].local == local[name])

        changed = {name for name in there if is_new(name)}
        gone = {name for name in local if is_gone(name)}
        transfer = plan_transfer(changed=changed, gone=gone, present=local, source=there)

        def fetch(name: str) -> Known | None:
            return self._get(name, stored=there[name])

        self._carry_out(transfer, known, scope=scope, copy=fetch, remove=self._remove_here)

    def _carry_out(
        self,
        transfer: Transfer,
        known: dict[str, Known],
        *,
        scope: str,
        copy: Callable[[str], Known | None],
        remove: Callable[[str], None],
    ) -> None:
        def forget(name: str) -> None:
            remove(name)
            known.pop(name, None)

        if not any((transfer.removed_first, transfer.copied, transfer.removed_last)):
            return
        # Before anything is copied: what a kill cuts short must not pass for something that the destination lacks.
        self._write_index(scope, known | dict.fromkeys(transfer.copied, BEGUN))
        try:
            for name in transfer.removed_first:
                forget(name)
            for name in transfer.copied:
                known[name] = BEGUN
                entry = copy(name)
                if entry is None:
                    del known[name]
                else:
                    known[name] = entry
            for name in transfer.removed_last:
                forget(name)
        finally:
            self._write_index(scope, known)

    def _refuse_loss(self, paths: tuple[str, ...]) -> None:
        whole = any(path in ("", "trials") for path in paths)
        for scope in self._local_trials() | {""} if whole else {_scope(path) for path in paths}:
            if any(entry.home is not None and _within(name, paths) for name, entry in (self._read_index(scope) or {}).items()):
                raise SetupError(
                    "the run's home is empty, but this machine has brought files there",
                    where=redacted(self.uri),
                    why="a mount that is gone looks like this, too",
                    fix=f"bring it back; or, if the run was deleted on purpose, delete its working copy {self.folder}",
                )

    # ---- one file

    def _put(self, name: str) -> Known | None:
        path = self.folder / name
        try:
            stamp = _stamp(path)
        except FileNotFoundError:
            return None  # removed since
        fs, root = self._open()
        target = f"{root}/{name}"

        def put() -> Stored:
            if fs.type_name == "local":
                check_mounted(Path(root))
            whole = fs.type_name in OBJECT_STORES
            parent, _, last = target.rpartition("/")
            written = target if whole else f"{parent}/.{last}.{uuid.uuid4().hex[:8]}.tmp"
            if not whole:
                fs.create_dir(parent, recursive=True)
            try:
                with open(path, "rb") as source, fs.open_output_stream(written) as stream:
                    left = stamp[0]  # a log may grow meanwhile
                    while left > 0 and (block := source.read(min(left, BLOCK_BYTES))):
                        stream.write(block)
                        left -= len(block)
                if not whole:
                    fs.move(written, target)
            except BaseException:
                if not whole:
                    with contextlib.suppress(OSError):
                        fs.delete_file(written)
                raise
            info = fs.get_file_info(target)
            return Stored(info.size, info.mtime_ns)

        stored = self._ask(put)
        return Known(local=stamp, home=stored if stored.size == stamp[0] else None, seen=time.time())

    def _get(self, name: str, *, stored: Stored) -> Known | None:
        path = self.folder / name
        fs, root = self._open()

        def get() -> Known | None:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
            try:
                with os.fdopen(descriptor, "wb") as file, fs.open_input_stream(f"{root}/{name}") as stream:
                    while block := stream.read(BLOCK_BYTES):
                        file.write(block)
                    file.flush()
                    os.fsync(file.fileno())
                os.chmod(temporary, 0o644)
                os.replace(temporary, path)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)
                raise
            stamp = _stamp(path)
            # One that was written again while it was read is fetched again the next time.
            return Known(local=stamp, home=stored if stamp[0] == stored.size else None, seen=time.time())

        try:
            return self._ask(get)
        except FileNotFoundError:
            return None  # removed since it was listed

    def _remove_there(self, name: str) -> None:
        fs, root = self._open()
        with contextlib.suppress(FileNotFoundError):
            self._ask(lambda: fs.delete_file(f"{root}/{name}"))

    def _remove_here(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)
        # A checkpoint's folder is told by its name.
        for folder in (self.folder / name).parents:
            if folder == self.folder:
                break
            with contextlib.suppress(OSError):
                folder.rmdir()

    # ---- both sides

    def _local(self, paths: tuple[str, ...], *, scope: str) -> dict[str, tuple[int, int, int]]:
        found = {}
        for path in paths:
            start = self.folder / path
            files = [start] if start.is_file() else _files_below(start)
            for file in files:
                name = file.relative_to(self.folder).as_posix()
                if _scope(name) == scope and not _is_hidden(name):
                    with contextlib.suppress(FileNotFoundError):
                        found[name] = _stamp(file)
        return found

    def _local_trials(self) -> set[str]:
        folder = self.folder / "trials"
        return {f"trials/{entry.name}" for entry in folder.iterdir() if entry.is_dir()} if folder.is_dir() else set()

    def _listing(self, paths: tuple[str, ...]) -> dict[str, Stored]:
        from pyarrow.fs import FileSelector, FileType

        fs, root = self._open()

        def listing() -> dict[str, Stored]:
            if fs.type_name == "local":
                check_mounted(Path(root))
            files = {}
            given = [f"{root}/{path}".rstrip("/") if path != OWN else root for path in paths]
            for info in fs.get_file_info(given):
                below = [info] if info.type == FileType.File else []
                if info.type != FileType.File:
                    below = fs.get_file_info(FileSelector(info.path, recursive=True, allow_not_found=True))
                for one in below:
                    if one.type == FileType.File:
                        files[one.path.removeprefix(root).lstrip("/")] = Stored(one.size, one.mtime_ns)
            return {name: stored for name, stored in files.items() if not _is_hidden(name)}

        return self._ask(listing)

    def _open(self) -> tuple[Any, str]:
        return self._filesystem or open_filesystem(self.uri)

    def _ask(self, action: Callable[[], T]) -> T:
        return ask_home(action, uri=self.uri)

    # ---- what is known

    def _index_path(self, scope: str) -> Path:
        return self.folder / HOME / f"{scope.replace('/', '-') or 'run'}.json"

    def _read_index(self, scope: str) -> dict[str, Known] | None:
        try:
            lines = read_json(self._index_path(scope))
            return {
                name: Known(tuple(local), None if home is None else Stored(*home), float(seen))
                for name, (local, home, seen) in lines.items()
            }
        except (InputError, ValueError, TypeError, AttributeError):
            return None

    def _write_index(self, scope: str, known: dict[str, Known]) -> None:
        lines = {
            name: [entry.local, None if entry.home is None else [entry.home.size, entry.home.mtime_ns], entry.seen]
            for name, entry in sorted(known.items())
        }
        write_json(self._index_path(scope), lines)


@functools.lru_cache(maxsize=16)
def open_filesystem(uri: str) -> tuple[Any, str]:
    """The pyarrow file system of a URI, and the path in it.

    Raises:
        SetupError: if pyarrow cannot open it.
    """
    from pyarrow.fs import FileSystem

    try:
        if uri.startswith("s3://") and "allow_delayed_open" not in uri:
            # A small file in one request instead of the three of an upload in parts.
            uri += ("&" if "?" in uri else "?") + "allow_delayed_open=true"
        fs, path = FileSystem.from_uri(uri)
    except (OSError, ValueError, NotImplementedError) as error:
        raise SetupError(
            f"the storage cannot be opened: {_first_line(error)}",
            where=redacted(uri),
            fix="correct storage_path; what may follow the '?' stands in https://arrow.apache.org/docs/python/filesystems.html",
        ) from error
    return fs, path.rstrip("/")


def ask_home(action: Callable[[], T], *, uri: str) -> T:
    """Call something of a URI's file system, for as long as it only may pass what stops it.

    Raises:
        StorageUnreachable: if the home does not answer.
        SetupError: if it refuses.
        FileNotFoundError: as the action raised it.
    """
    try:
        return patiently(action, place=redacted(uri), limit_s=home_limit_s)
    except FileNotFoundError:
        raise
    except OSError as error:
        if home_limit_s(error) is None:
            raise SetupError(
                f"the storage refuses: {_first_line(error)}",
                where=redacted(uri),
                fix="check the address, and the keys that this machine finds in its environment or profile",
            ) from error
        raise StorageUnreachable(error.errno or errno.EIO, f"the storage does not answer: {_first_line(error)}", redacted(uri)) from error


def home_limit_s(error: BaseException) -> float | None:
    """How long to wait for an error of a home to pass, seconds; None if it will not."""
    if not isinstance(error, OSError) or isinstance(error, (FileNotFoundError, PermissionError)):
        return None
    if any(word in str(error) for word in DENIED):
        return None
    # Object stores' errors have no number.
    return patience_s() if error.errno is None else storage_limit_s(error)


def attach(uri: str) -> RunStorage:
    """The working copy of the run at a URI on this machine, which need not hold anything yet."""
    folder = working_copy(uri)
    mark = folder / HOME / "uri"
    if not mark.exists():
        write_text(mark, uri + "\n")
    return RunStorage(folder, uri=uri)


def storage_of(place: str | Path) -> Storage:
    """The storage of a run, given by its URI, its working copy or its folder."""
    if is_uri(place):
        return attach(str(place))
    mark = Path(place) / HOME / "uri"
    if not mark.exists():
        return OwnHome()
    return RunStorage(Path(place), uri=mark.read_text(encoding="utf-8").strip())


def run_folder(place: str | Path) -> Path:
    """The folder of this machine that holds a run, given by its URI or its folder."""
    return working_copy(str(place)) if is_uri(place) else Path(place)


def fetch_run(uri: str) -> Path:
    """The working copy of a run at a URI, with all that its report and its status are made of.

    Raises:
        InputError: if the URI cannot be the home of a run, or there is none.
        SetupError: if the home cannot be reached.
    """
    problem = uri_problem(uri)
    if problem is not None:
        raise InputError(f"RUN {problem}", where=redacted(uri))
    uri = join_uri(uri)
    with telling():
        if not RunStorage(working_copy(uri), uri=uri).exists():
            raise InputError("no such run", where=redacted(uri), fix="give the folder that a sweep wrote: its storage_path and its name")
        storage = attach(uri)
        storage.pull(skip=WEIGHTS)
    return storage.folder


def bring_report(page: Path) -> str:
    """Bring a report and what lies beside it home; where to find the page.

    Args:
        page: ``RUN/report.html``.

    Raises:
        SetupError: if the home cannot be reached.
    """
    storage = storage_of(page.parent)
    with telling():
        storage.push(page.name, "trials.csv", "plots", "merged/README.md")
    return f"{join_uri(storage.uri, page.name)}, here {page}" if isinstance(storage, RunStorage) else str(page)


def run_address(folder: Path) -> str:
    """What to call a run by on other machines: the URI of its home, or its folder."""
    storage = storage_of(folder)
    return storage.uri if isinstance(storage, RunStorage) else str(Path(folder).resolve())


@contextlib.contextmanager
def telling() -> Iterator[None]:
    """Say in words for the user that the home does not answer.

    Raises:
        SetupError: in place of StorageUnreachable.
    """
    try:
        yield
    except StorageUnreachable as error:
        raise SetupError(
            str(error.strerror), where=error.filename, fix="run the same command again when it does: it goes on where it stopped"
        ) from error


def _scope(path: str) -> str:
    parts = PurePosixPath(path).parts
    return "/".join(parts[:2]) if len(parts) > 1 and parts[0] == "trials" else ""


def _whole(paths: tuple[str, ...], scope: str) -> bool:
    return scope in paths or (scope == "" and OWN in paths)


def _within(name: str, paths: Collection[str]) -> bool:
    return any(path in ("", OWN) or name == path or name.startswith(path + "/") for path in paths)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(name).parts)


def _files_below(folder: Path) -> list[Path]:
    return [Path(root) / file for root, _, files in os.walk(folder) for file in files]


def _stamp(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
