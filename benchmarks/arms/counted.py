"""Runs a Python program, then writes what it moved: ``python counted.py FILE PROGRAM [ARGUMENT ...]``.

PROGRAM is a script, or ``-m`` and a module. Standard library only, so that any interpreter can run it beside any program.
"""

import atexit
import runpy
import sys


def _report(path):
    with open("/proc/self/io", encoding="ascii") as counters, open("/proc/self/status", encoding="utf-8") as status:
        lines = [*counters, *(line for line in status if line.startswith("VmHWM"))]
    with open(path, "w", encoding="ascii") as file:
        file.writelines(lines)


def _main():
    path, *program = sys.argv[1:]
    atexit.register(_report, path)
    if program[0] == "-m":
        sys.argv = program[1:]
        sys.path[0] = ""
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = program
        sys.path.pop(0)
        runpy.run_path(program[0], run_name="__main__")


_main()
