"""A run at a URI: what is copied, in which order, and what each side keeps."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher import storage as storage_module
from launcher.faults import STOP, clear_stop, request_stop, stop_reason
from launcher.storage import (
    HOME,
    OWN,
    RESUME_ONLY,
    OwnHome,
    RunStorage,
    StorageUnreachable,
    attach,
    home_limit_s,
    run_address,
    run_folder,
    storage_of,
)
from launcher.storage_place import is_uri, join_uri, redacted, uri_problem, working_copy
from launcher.transfer import VOUCHING, plan_transfer
from tests.helpers.frail_filesystem import Frailty, frail_filesystem
from trainers import patience
from trainers.errors import SetupError
from trainers.files import append_jsonl, write_json, write_text


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(patience.PATIENCE_VARIABLE, "0")
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.001)


class Machine:
    """A working copy of its own, and what it asks of the home."""

    def __init__(self, root: Path, name: str, **frailty: object) -> None:
        self.folder = root / name / "run"
        self.folder.mkdir(parents=True)
        self.frailty = Frailty(**frailty)  # type: ignore[arg-type]
        self.storage = RunStorage(self.folder, uri="file:///home/run", filesystem=frail_filesystem(root / "home" / "run", self.frailty))

    def moved(self, act: Callable[[], None]) -> int:
        """Files that are copied meanwhile."""
        before = self.frailty.moved()
        act()
        return self.frailty.moved() - before


def vouch(folder: Path, name: str, **files: str) -> None:
    """Write files, and last the one that says what they hold."""
    for file, text in files.items():
        write_text(folder / file, text)
    write_json(folder / name, files)


def write_run(folder: Path) -> None:
    """A run in the middle of its trials, with a merge."""
    write_json(folder / "sweep.json", {"trials": 1})
    append_jsonl(folder / "events.jsonl", {"kind": "stage_started"})
    vouch(folder / "trials/t0/checkpoints/step-1", "manifest.json", weights="1")
    write_text(folder / "trials/t0/checkpoints/step-1/optimizer", "1")
    write_json(folder / "trials/t0/status.json", {"state": "running"})
    append_jsonl(folder / "trials/t0/metrics.jsonl", {"step": 1})
    vouch(folder / "merged", "merge.json", shard_a="old a", shard_b="old b")
    vouch(folder / "merged", "eval.json", shard_a="old a", shard_b="old b")


def change_run(folder: Path) -> None:
    """Its next checkpoint, the end of its trial, and another winner."""
    vouch(folder / "trials/t0/checkpoints/step-2", "manifest.json", weights="2", optimizer="2")
    (folder / "trials/t0/checkpoints/step-1/optimizer").unlink()
    append_jsonl(folder / "trials/t0/metrics.jsonl", {"step": 2})
    write_json(folder / "trials/t0/status.json", {"state": "finished"})
    shutil.rmtree(folder / "merged")
    vouch(folder / "merged", "merge.json", shard_a="new a")


def files(folder: Path) -> dict[str, bytes]:
    """Everything but what is hidden."""
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(name): (folder / name).read_bytes() for name in names if not any(part.startswith(".") for part in name.parts)}


def broken_promises(folder: Path) -> list[str]:
    """Files that a vouching file, or the end of a trial, promises, and that are not there as promised."""
    found = []
    for path in folder.rglob("*"):
        if path.name in VOUCHING:
            for name, text in json.loads(path.read_text()).items():
                file = path.parent / name
                if not file.exists() or file.read_text() != text:
                    found.append(str(file.relative_to(folder)))
        if path.name == "status.json" and json.loads(path.read_text())["state"] == "finished":
            found += [] if (path.parent / "checkpoints/step-2/manifest.json").exists() else [str(path)]
    return found


def checkpoints(folder: Path) -> set[str]:
    return {path.parent.name for path in folder.glob("trials/t0/checkpoints/*/manifest.json")}


# --- order


def number_of_changes(tmp_path: Path) -> int:
    """How many calls bring the changed run home where nothing fails."""
    machine = Machine(tmp_path, "count")
    write_run(machine.folder)
    machine.storage.push()
    change_run(machine.folder)
    before = machine.frailty.changing
    machine.storage.push()
    return machine.frailty.changing - before


@pytest.mark.parametrize("killed", [False, True])
def test_whatever_call_fails_the_home_never_promises_what_it_does_not_hold(
    killed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each failure the checkpoint that was there is still whole, and the next push mends everything.

    ``killed``: the process dies at the call, so that nothing it knows by then is written.
    """
    total = number_of_changes(tmp_path / "count")
    assert total > 20
    for call in range(1, total + 1):
        root = tmp_path / str(call)
        machine = Machine(root, "here")
        write_run(machine.folder)
        machine.storage.push()
        change_run(machine.folder)
        machine.frailty.fails_at = machine.frailty.changing + call
        with monkeypatch.context() as patch:
            if killed:
                write, written = machine.storage._write_index, set()

                def first_only(scope: str, known: dict, write=write, written=written) -> None:
                    if scope not in written:
                        write(scope, known)
                    written.add(scope)

                patch.setattr(machine.storage, "_write_index", first_only)
            with pytest.raises(StorageUnreachable):
                machine.storage.push()
        home = root / "home/run"
        assert broken_promises(home) == [], f"after call {call}"
        assert "step-1" in checkpoints(home), "what was finished is not given up"
        machine.frailty.fails_at = 0
        machine.storage.push()
        assert files(home) == files(machine.folder)
        other = Machine(root, "other")
        other.storage.pull()
        assert files(other.folder) == files(home)


def test_a_plain_copy_would_break_a_promise(tmp_path: Path) -> None:
    """Negative control: copied in the order of their names, old and new weights would lie under one manifest."""
    write_run(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "home")
    change_run(tmp_path / "here")
    broken = []
    for name, data in files(tmp_path / "here").items():
        (tmp_path / "home" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "home" / name).write_bytes(data)
        broken += broken_promises(tmp_path / "home")
    assert "merged/shard_a" in broken


def test_a_pull_that_ends_anywhere_leaves_no_broken_promise_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for read in range(1, 40):
        root = tmp_path / str(read)
        writer, reader = Machine(root, "writer"), Machine(root, "reader")
        write_run(writer.folder)
        writer.storage.push()
        reader.storage.pull()
        change_run(writer.folder)
        writer.storage.push()
        whole, reads = reader.storage._get, []

        def get(name: str, *, stored: object, whole=whole, reads=reads, read=read) -> object:
            reads.append(name)
            if len(reads) == read:
                raise StorageUnreachable(errno.ESTALE, "gone", name)
            return whole(name, stored=stored)

        monkeypatch.setattr(reader.storage, "_get", get)
        try:
            reader.storage.pull()
        except StorageUnreachable:
            assert broken_promises(reader.folder) == []
            monkeypatch.setattr(reader.storage, "_get", whole)
            reader.storage.pull()
            assert files(reader.folder) == files(writer.folder)
        else:
            assert read > 4
            return
    raise AssertionError("every pull failed")


def test_plain_files_go_first_then_what_vouches_then_what_closes() -> None:
    changed = {"status.json", "eval.json", "eval-rows.jsonl", "checkpoints/1/weights", "checkpoints/1/manifest.json", "config.yaml"}
    transfer = plan_transfer(changed=changed, gone=(), present=(), source=changed)
    assert transfer.copied == (
        "config.yaml",
        "eval-rows.jsonl",
        "checkpoints/1/weights",
        "checkpoints/1/manifest.json",
        "eval.json",
        "status.json",
    )
    assert transfer.removed_first == transfer.removed_last == ()


def test_a_log_that_grows_takes_no_promise_back() -> None:
    """A trial's status and scores stay while its log grows; replaced weights take their folder's manifest away first."""
    here = {"t/eval.json", "t/logs/rank-0.log", "t/metrics.jsonl"}
    transfer = plan_transfer(changed={"t/logs/rank-0.log", "t/metrics.jsonl"}, gone=(), present=here, source=here)
    assert transfer.removed_first == ()
    weights = {"m/merge.json", "m/weights"}
    transfer = plan_transfer(changed={"m/weights"}, gone=(), present=weights, source=weights)
    assert transfer.removed_first == ("m/merge.json",)
    assert transfer.copied == ("m/weights", "m/merge.json"), "it comes back although it did not change"


# --- what is copied, and who is right


def test_only_what_changed_is_copied(tmp_path: Path) -> None:
    here, there = Machine(tmp_path, "here"), Machine(tmp_path, "there")
    write_run(here.folder)
    assert here.moved(here.storage.push) == len(files(here.folder))
    assert here.moved(here.storage.push) == 0
    assert here.moved(here.storage.pull) == 0, "what it brought itself needs no fetching"
    assert there.moved(there.storage.pull) == len(files(here.folder))
    assert there.moved(there.storage.pull) == 0
    append_jsonl(here.folder / "events.jsonl", {"kind": "stage_finished"})
    assert here.moved(here.storage.push) == 1
    assert there.moved(there.storage.pull) == 1
    assert files(there.folder) == files(here.folder)


def test_without_what_it_knew_everything_is_copied_and_nothing_is_wrong(tmp_path: Path) -> None:
    here = Machine(tmp_path, "here")
    write_run(here.folder)
    here.storage.push()
    shutil.rmtree(here.folder / HOME)
    change_run(here.folder)
    assert here.moved(here.storage.push) == len(files(here.folder))
    assert broken_promises(tmp_path / "home/run") == []
    shutil.rmtree(here.folder / HOME)
    assert here.moved(here.storage.pull) > 0
    assert broken_promises(here.folder) == []


def test_a_file_that_changed_here_only_stays_and_one_that_changed_on_both_sides_is_the_homes(tmp_path: Path) -> None:
    here, there = Machine(tmp_path, "here"), Machine(tmp_path, "there")
    for name in ("mine", "ours", "theirs"):
        write_text(here.folder / name, "first")
    here.storage.push()
    there.storage.pull()
    for name in ("ours", "theirs"):
        write_text(there.folder / name, "there")
    there.storage.push()
    for name in ("mine", "ours"):
        write_text(here.folder / name, "here")
    here.storage.pull()
    assert files(here.folder) == {"mine": b"here", "ours": b"there", "theirs": b"there"}
    here.storage.push()
    assert files(tmp_path / "home/run") == files(here.folder)


def test_what_one_machine_deletes_goes_everywhere(tmp_path: Path) -> None:
    here, there = Machine(tmp_path, "here"), Machine(tmp_path, "there")
    write_run(here.folder)
    here.storage.push()
    there.storage.pull()
    change_run(here.folder)
    here.storage.pull()
    assert not (here.folder / "merged/shard_b").exists(), "a pull does not bring back what was deleted here and not yet there"
    here.storage.push()
    there.storage.pull()
    assert files(there.folder) == files(here.folder)
    assert "trials/t0/checkpoints/step-1/optimizer" not in files(there.folder)


def test_a_working_copy_that_was_thrown_away_is_no_wish_to_delete_the_run(tmp_path: Path) -> None:
    here = Machine(tmp_path, "here")
    write_run(here.folder)
    here.storage.push()
    expected = files(here.folder)
    for entry in here.folder.iterdir():
        if entry.name != HOME:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    here.storage.push()
    assert files(tmp_path / "home/run") == expected
    here.storage.pull()
    assert files(here.folder) == expected


def test_a_home_that_lost_everything_is_refused(tmp_path: Path) -> None:
    """A mount that is gone looks like this."""
    here = Machine(tmp_path, "here")
    write_run(here.folder)
    here.storage.push()
    shutil.rmtree(tmp_path / "home")
    expected = files(here.folder)
    for paths in ((), ("trials/t0",), ("sweep.json", "merged")):
        with pytest.raises(SetupError, match=r"home is empty(.|\n)*delete its working copy"):
            here.storage.pull(*paths)
        assert files(here.folder) == expected
    here.storage.pull("never/brought")


def test_an_exact_folder_holds_what_the_home_holds(tmp_path: Path) -> None:
    """All ranks must go on from one checkpoint: one that was written here and never brought home is given up."""
    here = Machine(tmp_path, "here")
    write_run(here.folder)
    here.storage.push()
    change_run(here.folder)
    log = here.folder / "trials/t0/logs/rank-0.log"
    write_text(log, "open in another process")
    here.storage.pull("trials/t0", exact=("trials/t0/checkpoints",))
    assert checkpoints(here.folder) == {"step-1"}
    assert (here.folder / "trials/t0/checkpoints/step-1/optimizer").exists()
    assert not (here.folder / "trials/t0/checkpoints/step-2").exists()
    assert broken_promises(here.folder / "trials/t0/checkpoints") == []
    assert log.exists()
    assert (here.folder / "merged/shard_a").read_text() == "new a", "nothing else was looked at"


def test_files_that_are_left_there_are_not_deleted_there(tmp_path: Path) -> None:
    here, there = Machine(tmp_path, "here"), Machine(tmp_path, "there")
    write_text(here.folder / "trials/t0/checkpoints/step-1" / RESUME_ONLY[0], "moments")
    write_text(here.folder / "trials/t0/status.json", "{}")
    here.storage.push()
    there.storage.pull(skip=RESUME_ONLY)
    assert set(files(there.folder)) == {"trials/t0/status.json"}
    write_text(there.folder / "trials/t0/status.json", "{} ")
    there.storage.push()
    assert len(files(tmp_path / "home/run")) == 2
    there.storage.pull()
    assert len(files(there.folder)) == 2


def test_the_runs_own_files_are_brought_without_its_trials(tmp_path: Path) -> None:
    here = Machine(tmp_path, "here")
    write_run(here.folder)
    here.storage.push(OWN)
    assert not (tmp_path / "home/run/trials").exists()
    assert (tmp_path / "home/run/merged/merge.json").exists()
    here.storage.push("trials/t0")
    assert files(tmp_path / "home/run") == files(here.folder)


def test_what_is_hidden_stays_here(tmp_path: Path) -> None:
    here = Machine(tmp_path, "here")
    for name in (".lock", ".tune/state", "trials/t0/.status.json.x.tmp", "seen"):
        write_text(here.folder / name, "x")
    here.storage.push()
    assert set(files(tmp_path / "home/run")) == {"seen"}
    assert [path.name for path in (tmp_path / "home/run").iterdir()] == ["seen"]


def test_a_log_that_grows_while_it_is_copied_is_brought_whole_the_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = Machine(tmp_path, "here"), Machine(tmp_path, "there")
    log = here.folder / "trials/t0/rank-0.log"
    write_text(log, "one\n")
    stamp = storage_module._stamp

    def stamp_and_grow(path: Path) -> tuple[int, int, int]:
        found = stamp(path)
        if path == log:
            with open(log, "a") as file:
                file.write("more\n")
        return found

    monkeypatch.setattr(storage_module, "_stamp", stamp_and_grow)
    here.storage.push()
    monkeypatch.undo()
    monkeypatch.setenv(patience.PATIENCE_VARIABLE, "0")
    here.storage.pull()
    assert len(log.read_text().splitlines()) > 1, "the home's shorter copy does not replace it"
    here.storage.push()
    there.storage.pull()
    assert files(there.folder) == files(here.folder)


@pytest.mark.parametrize("whole_seconds", [True, False])
def test_a_second_change_within_one_second_is_seen(whole_seconds: bool, tmp_path: Path) -> None:
    """Object stores tell whole seconds: a small file that was just written is fetched once more rather than missed."""
    here, there = Machine(tmp_path, "here", whole_seconds=whole_seconds), Machine(tmp_path, "there", whole_seconds=whole_seconds)
    home = tmp_path / "home/run/status.json"
    for text in ("1", "2", "3"):
        write_text(here.folder / "status.json", text)
        here.storage.push()
        os.utime(home, ns=(10**9 * int(home.stat().st_mtime), 10**9 * int(home.stat().st_mtime))) if whole_seconds else None
        there.storage.pull()
        assert (there.folder / "status.json").read_text() == text


# --- requests to stop


def test_a_request_to_stop_reaches_other_machines_and_is_taken_back_there(tmp_path: Path) -> None:
    driver, other = Machine(tmp_path, "driver"), Machine(tmp_path, "other")
    signs = (STOP, f"trials/t0/{STOP}")
    request_stop(driver.folder, "budget")
    driver.storage.read_signs(signs)
    assert stop_reason(driver.folder) == "budget", "a trial beside the driver does not take back what is not brought home yet"
    other.storage.read_signs(signs)
    assert stop_reason(other.folder) is None
    driver.storage.send_signs(signs)
    other.storage.read_signs(signs)
    assert stop_reason(other.folder) == "budget"
    assert stop_reason(other.folder / "trials/t0") is None
    clear_stop(driver.folder)
    request_stop(driver.folder / "trials/t0", "pruned")
    driver.storage.send_signs(signs)
    other.storage.read_signs(signs)
    assert stop_reason(other.folder) is None
    assert stop_reason(other.folder / "trials/t0") == "pruned"
    other.storage.push()
    driver.storage.pull()
    assert stop_reason(driver.folder) is None, "they are no files of the run"


# --- a home that does not answer


def test_a_home_that_is_gone_for_a_moment_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(patience.PATIENCE_VARIABLE, "60")
    here = Machine(tmp_path, "here", fails_at=2, times=3)
    write_run(here.folder)
    with caplog.at_level(logging.WARNING):
        here.storage.push()
    assert files(tmp_path / "home/run") == files(here.folder)
    assert len(caplog.records) == 1
    assert "trying again" in caplog.text


def test_a_home_that_refuses_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(patience.PATIENCE_VARIABLE, "60")
    here = Machine(tmp_path, "here", fails_at=1, number=errno.EACCES)
    write_run(here.folder)
    with pytest.raises(SetupError, match=r"the storage refuses(.|\n)*keys"):
        here.storage.push()
    assert here.frailty.changing == 1


def test_an_unknown_option_of_a_uri_is_told(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="cannot be opened"):
        RunStorage(tmp_path, uri="s3://bucket/run?colour=red").pull()


# --- a real object store


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The URI of a bucket of moto's server; its executable may lie in another environment, which the PATH names."""
    server = shutil.which("moto_server")
    if server is None:
        pytest.skip("moto_server is not installed (pip install 'moto[server]')")
    from pyarrow.fs import FileSystem

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv(patience.PATIENCE_VARIABLE, "60")
    with open(tmp_path / "moto.log", "wb") as log:
        process = subprocess.Popen([server, "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=subprocess.STDOUT)
    try:
        options = f"?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
        fs, _ = FileSystem.from_uri(f"s3://bucket{options}&allow_bucket_creation=true")
        patience.patiently(lambda: fs.create_dir("bucket"), place="moto", limit_s=home_limit_s)
        yield f"s3://bucket/runs/run{options}"
    finally:
        process.terminate()
        process.wait()


def test_an_object_store_holds_a_run(bucket: str, tmp_path: Path) -> None:
    here, there = RunStorage(tmp_path / "here", uri=bucket), RunStorage(tmp_path / "there", uri=bucket)
    write_run(here.folder)
    assert not here.exists()
    for change in (lambda folder: None, change_run):
        change(here.folder)
        here.push()
        there.pull()
        assert files(there.folder) == files(here.folder)
    for text in ("1", "2", "3"):  # all within one second of the store's clock
        write_text(here.folder / "trials/t0/status.json", text)
        here.push()
        there.pull()
        assert (there.folder / "trials/t0/status.json").read_text() == text
    write_text(there.folder / "unbrought", "x")
    with pytest.raises(SetupError, match="NO_SUCH_BUCKET"):
        RunStorage(there.folder, uri=bucket.replace("s3://bucket", "s3://nobody")).push("unbrought")


# --- names


def test_a_folder_is_its_own_home_and_a_uri_has_a_working_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNLEARN_CACHE", str(tmp_path / "cache"))
    assert isinstance(storage_of(tmp_path), OwnHome)
    assert run_address(tmp_path) == str(tmp_path)
    storage_of(tmp_path).push()
    assert list(tmp_path.iterdir()) == [], "nothing is written beside it"
    uri = f"file://{tmp_path}/home/run"
    folder = attach(uri).folder
    assert folder == working_copy(uri) == run_folder(uri)
    assert folder.name == "run"
    assert folder.is_relative_to(tmp_path / "cache")
    assert run_address(folder) == uri
    assert isinstance(storage_of(folder), RunStorage)
    assert working_copy("s3://bucket/run") != working_copy("s3://other/run")


@pytest.mark.parametrize(
    ("uri", "problem"),
    [
        ("s3://bucket/runs", None),
        ("s3://bucket/runs?endpoint_override=localhost:9000&scheme=http&region=eu-west-1", None),
        ("gs://bucket", None),
        ("file:///mnt/runs", None),
        ("s3://AKIAIOSFODNN7EXAMPLE:wJalrXUtnFEMI@bucket/runs", "holds keys"),
        ("s3://bucket/runs?secret_key=wJalrXUtnFEMI", "holds keys"),
        ("abfs://fs@account.dfs.core.windows.net/runs?sas_token=wJalrXUtnFEMI", "holds keys"),
        ("s3://bucket/runs?endpoint_override=http://user:wJalrXUtnFEMI@host", "holds keys"),
        ("ftp://host/runs", "one of file, s3"),
        ("s3:///runs", "names no bucket"),
        ("file://runs", "three slashes"),
        ("s3://bucket/a#b", "'#'"),
        ("s3://[bucket", "well-formed"),
    ],
)
def test_a_uri_is_refused_without_repeating_its_keys(uri: str, problem: str | None) -> None:
    assert is_uri(uri)
    found = uri_problem(uri)
    assert (problem is None and found is None) or (problem is not None and found is not None and problem in found)
    assert "wJalr" not in str(found)
    if "[" not in uri:
        assert "wJalr" not in redacted(uri).replace("http://user:wJalrXUtnFEMI@host", "")


def test_a_runs_uri_keeps_its_options_at_the_end() -> None:
    assert join_uri("s3://bucket/runs/?region=eu", "small") == "s3://bucket/runs/small?region=eu"
    assert join_uri("file:///runs", "small", "report.html") == "file:///runs/small/report.html"
