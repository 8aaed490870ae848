"""A trial's log holds everything that its process prints, and nothing is left redirected."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

from launcher.logs import last_lines


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A Python program in a process of its own: pytest replaces the streams of this one."""
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, cwd=folder)


CAPTURE = """
    import logging, os, subprocess, sys
    from pathlib import Path
    from launcher.logs import capture_output

    try:
        with capture_output(Path("logs/rank-0.log")):
            print("python")
            os.write(2, b"library\\n")
            subprocess.run(["echo", "child"])
            logging.getLogger("trainers").error("logged")
            if sys.argv[1:]:
                raise ValueError("in the block")
    except ValueError as error:
        print("caught", error)
    print("afterwards")
    logging.getLogger("trainers").error("also afterwards")
"""


def test_output_of_python_libraries_children_and_loggers_goes_to_the_file(tmp_path: Path) -> None:
    done = run(CAPTURE, tmp_path)
    log = (tmp_path / "logs" / "rank-0.log").read_text().splitlines()
    assert sorted(line.split(" ")[-1] for line in log) == ["child", "library", "logged", "python"]
    assert done.stdout == "afterwards\n"
    assert "also afterwards" in done.stderr
    assert "logged" not in done.stderr


def test_the_streams_come_back_after_an_error(tmp_path: Path) -> None:
    code = CAPTURE.replace("if sys.argv[1:]:", "if True:")
    done = run(code, tmp_path)
    assert done.stdout == "caught in the block\nafterwards\n"


def test_a_second_start_is_appended_to_the_first(tmp_path: Path) -> None:
    for _ in range(2):
        run(CAPTURE, tmp_path)
    assert (tmp_path / "logs" / "rank-0.log").read_text().count("python\n") == 2


def test_last_lines_are_read_from_the_end_and_survive_odd_bytes(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"".join(b"line %d\n" % number for number in range(5000)) + b"\xff\xfe end\n")
    lines = last_lines(log, count=3)
    assert list(lines[:2]) == ["line 4998", "line 4999"]
    assert lines[2].endswith(" end")
    assert last_lines(tmp_path / "absent") == []
