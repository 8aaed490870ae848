"""Commented configuration files to start from."""

from __future__ import annotations

from pathlib import Path

from launcher.problems import nearest
from trainers.errors import InputError
from trainers.files import write_text

RECIPES = Path(__file__).parent / "recipes"
_CLUSTER = "cluster-"
_SUBMIT = {"submit.py": RECIPES.parent / "submit.py", ".rayignore": RECIPES / "ignore.txt"}
_BESIDE = {"aws": _SUBMIT, "onprem": _SUBMIT, "skypilot": {".skyignore": RECIPES / "ignore.txt"}}
"""What is written beside a cluster file of a kind: the script that `ray submit` sends, and what is not to be uploaded."""
_PUBLISHED = "# Source:"
"""Begins a line of every experiment that reproduces a published system, and of no other."""


def template_names() -> list[str]:
    """The experiment templates."""
    return sorted(file.stem for file in RECIPES.glob("*.yaml") if not file.name.startswith(_CLUSTER))


def find_recipe(path: Path) -> Path:
    """The file of a shipped recipe where a bare name such as ``olmo-7b-16`` is given and no file has it; else the path itself."""
    shipped = RECIPES / f"{path}.yaml"
    return shipped if str(path) in template_names() and not path.exists() else path


def template_descriptions(*, published: bool) -> dict[str, str]:
    """Name and first line of the templates that reproduce a published system, or of the others."""
    texts = {name: (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines() for name in template_names()}
    return {
        name: lines[0].removeprefix("#").strip()
        for name, lines in texts.items()
        if any(line.startswith(_PUBLISHED) for line in lines) == published
    }


def template_listing() -> str:
    """Every template with its description, grouped."""
    groups = {"Start here:": False, "Published systems (each file lists its deviations):": True}
    blocks = []
    for title, published in groups.items():
        found = template_descriptions(published=published)
        width = max(map(len, found), default=0)
        blocks.append("\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in found.items())]))
    return "\n\n".join([*blocks, "unlearn init --template NAME writes one of them into this folder."])


def cluster_files() -> dict[str, Path]:
    """The cluster file of each kind."""
    return {file.stem.removeprefix(_CLUSTER): file for file in sorted(RECIPES.glob(f"{_CLUSTER}*"))}


def write_template(name: str | None, *, cluster: str | None = None, folder: Path) -> list[Path]:
    """Write a template as ``NAME.yaml``, and a cluster file if asked for one, into a folder.

    What belongs beside a cluster file is written, too, where there is none yet.

    Args:
        name: the template; None writes the cluster file alone.
        cluster: kind of the cluster file.
        folder: where to write.

    Returns:
        The files written.

    Raises:
        InputError: if there is no such template or cluster kind, or a file of that name exists; then nothing is written.
    """
    names, kinds = template_names(), cluster_files()
    if name is not None and name not in names:
        raise InputError(f'no template "{name}"{nearest(name, names)}', where="--template", fix=f"use one of {', '.join(names)}")
    if cluster is not None and cluster not in kinds:
        raise InputError(
            f'no cluster file "{cluster}"{nearest(cluster, list(kinds))}', where="--cluster", fix=f"use one of {', '.join(kinds)}"
        )
    sources = ([RECIPES / f"{name}.yaml"] if name else []) + ([kinds[cluster]] if cluster else [])
    files = {folder / source.name: source for source in sources}
    taken = [str(target) for target in files if target.exists()]
    if taken:
        raise InputError(
            f"{' and '.join(taken)} exists and is not overwritten",
            where=str(folder.resolve()),
            fix="rename or delete it, or work in another folder",
        )
    beside = {folder / name: source for name, source in _BESIDE.get(cluster or "", {}).items()}
    files |= {target: source for target, source in beside.items() if not target.exists()}
    for target, source in files.items():
        write_text(target, source.read_text(encoding="utf-8"))
    return list(files)
