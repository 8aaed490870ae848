"""Which benchmark a data folder holds, told from its file names."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path

from eval.suites.items import SUFFIXES, find_file
from trainers.errors import InputError


class Layout(StrEnum):
    """The benchmarks that can be evaluated."""

    LUME = "lume"
    TOFU = "tofu"
    MUSE = "muse"


MUSE_FILES = {
    "knowmem_forget": ("knowmem_forget", "knowmem_forget_qa", "knowmem/forget_qa", "knowmem/forget"),
    "knowmem_forget_icl": ("knowmem_forget_icl", "knowmem_forget_qa_icl", "knowmem/forget_qa_icl", "knowmem/forget_icl"),
    "knowmem_retain": ("knowmem_retain", "knowmem_retain_qa", "knowmem/retain_qa", "knowmem/retain"),
    "knowmem_retain_icl": ("knowmem_retain_icl", "knowmem_retain_qa_icl", "knowmem/retain_qa_icl", "knowmem/retain_icl"),
    "verbmem_forget": ("verbmem_forget", "verbmem/forget"),
    "privleak_forget": ("privleak_forget", "privleak/forget"),
    "privleak_retain": ("privleak_retain", "privleak/retain"),
    "privleak_holdout": ("privleak_holdout", "privleak/holdout"),
}
"""The files of MUSE by what they are for, and the names under which each is found: flat, or in folders as published."""

_FORGET = re.compile(r"(forget\d+)(_perturbed)?")
_NEEDS = (
    "lume: forget.jsonl and retain.jsonl; "
    "tofu: forget01, forget05 or forget10 (with _perturbed), retain_perturbed, real_authors_perturbed, world_facts_perturbed; "
    "muse: any of knowmem_forget, knowmem_retain (each with _icl), verbmem_forget, privleak_forget with privleak_holdout"
)


def forget_splits(folder: Path) -> dict[str, bool]:
    """TOFU's forget sets in a folder, by name, and whether each has its ``_perturbed`` file."""
    found: dict[str, bool] = {}
    for entry in sorted(Path(folder).iterdir()):
        match = _FORGET.fullmatch(entry.stem if entry.suffix in SUFFIXES else entry.name.removesuffix("-00000-of-00001.parquet"))
        if match and find_file(folder, stems=[match[0]]):
            found[match[1]] = found.get(match[1], False) or match[2] is not None
    return found


def recognise(folder: Path) -> Layout:
    """The layout of a folder.

    Raises:
        InputError: if it has the files of none, or of several.
    """
    folder = Path(folder)
    found = []
    if any(find_file(folder, stems=[name]) for name in ("forget", "retain")):
        found.append(Layout.LUME)
    if forget_splits(folder):
        found.append(Layout.TOFU)
    if any(find_file(folder, stems=stems) for stems in MUSE_FILES.values()):
        found.append(Layout.MUSE)
    if len(found) == 1:
        return found[0]
    names = sorted(entry.name for entry in folder.iterdir())
    listing = f"found: {', '.join(names[:12]) or 'nothing'}" + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    if found:
        raise InputError(
            f"the folder has the files of {' and of '.join(found)}",
            where=str(folder),
            why=listing,
            fix=" or ".join(f"--layout {layout}" for layout in found),
        )
    raise InputError("the folder has the files of no known benchmark", where=str(folder), why=listing, fix=f"a layout needs: {_NEEDS}")
