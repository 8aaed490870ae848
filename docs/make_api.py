"""Writes docs/api.md from the docstrings of what a user would import.

    python docs/make_api.py            writes the page
    python docs/make_api.py --check    fails if the page is not what the docstrings say

The source files are parsed, not imported, so that the page is the same on every machine. ``PUBLIC`` is the list of what is public.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

ROOT = Path(__file__).resolve().parents[1]
PAGE = Path(__file__).resolve().with_name("api.md")
WIDTH = 140

PUBLIC: Mapping[str, tuple[str, ...]] = {
    "Whole tasks": (
        "launcher.api:unlearn",
        "launcher.load:load_experiment",
        "launcher.load:LoadedExperiment",
        "launcher.stages:run_sweep",
        "launcher.stages:run_train",
        "launcher.stages:run_memorize",
        "launcher.stages:evaluate_model",
        "launcher.audit:run_audit",
        "launcher.report:build_report",
    ),
    "Errors": (
        "trainers.errors:UserFacingError",
        "trainers.errors:InputError",
        "trainers.errors:RunError",
        "trainers.errors:SetupError",
    ),
    "Data and models": (
        "trainers.data.types:Record",
        "trainers.data.types:ForgetRetain",
        "trainers.data.types:AttackDocuments",
        "trainers.data.records:load_forget_retain",
        "trainers.data.records:load_attack_documents",
        "trainers.modeling:load_model",
        "trainers.modeling:load_tokenizer",
        "trainers.modeling:load_adapted_model",
        "trainers.memorize:MemorizeConfig",
        "trainers.memorize:memorize",
    ),
    "A trial": (
        "trainers.config:TrainConfig",
        "trainers.config:ObjectiveConfig",
        "trainers.config:LoraConfig",
        "trainers.config:TrainableConfig",
        "trainers.config:ScheduleConfig",
        "trainers.config:EngineConfig",
        "trainers.trial_rows:TrialInputs",
        "trainers.loop:train_worker",
    ),
    "Objectives": (
        "trainers.objectives.terms:Scored",
        "trainers.objectives.terms:Distributions",
        "trainers.objectives.terms:Activations",
        "trainers.objectives.terms:LossTerm",
        "trainers.objectives.terms:Unit",
        "trainers.objectives.terms:StepCounts",
        "trainers.objectives.terms:SideCounts",
        "trainers.objectives.terms:step_loss",
        "trainers.objectives.terms:averaged",
        "trainers.objectives.table:Need",
        "trainers.objectives.table:objective_terms",
        "trainers.objectives.grad_ascent:grad_ascent_term",
        "trainers.objectives.npo:npo_term",
        "trainers.objectives.simnpo:simnpo_term",
        "trainers.objectives.dpo:dpo_term",
        "trainers.objectives.rmu:activation_term",
        "trainers.objectives.undial:undial_term",
        "trainers.objectives.wga:wga_term",
        "trainers.objectives.satimp:satimp_term",
        "trainers.objectives.ce_u:ce_u_term",
        "trainers.objectives.forget_ce:forget_ce_term",
        "trainers.objectives.ng_diff:normalised_coefficients",
        "trainers.objectives.retain_ce:retain_ce_term",
        "trainers.objectives.retain_kl:retain_kl_term",
    ),
    "Merging": (
        "merging.config:MergeConfig",
        "merging.merge:merge_checkpoint",
        "merging.merge:verify_merge",
        "merging.adapter_output:merge_adapter",
        "merging.task_vectors:open_task_vector",
        "merging.task_vectors:TaskVector",
        "merging.ties:trim",
        "merging.ties:ties",
        "merging.ties:ties_merge",
        "merging.ties:TiesMerge",
        "merging.linear:linear",
        "merging.linear:task_arithmetic",
        "merging.in_memory:MergeSession",
    ),
    "Pair search": (
        "merging.config:PairConfig",
        "merging.config:ObjectiveWeights",
        "merging.pairs:Candidate",
        "merging.pairs:bracketing_pairs",
        "merging.search:search_pairs",
    ),
    "Evaluation": (
        "eval.config:EvalConfig",
        "eval.runner:evaluate",
        "eval.runner:loss_only",
        "eval.runner:QuickSignals",
        "eval.report:EvalReport",
        "eval.report:read_report",
        "eval.report:write_report",
        "eval.rouge:rouge_l_recall",
        "eval.exact_match:exact_match",
        "eval.mia:attack_auc",
        "eval.mia:mia_score",
        "eval.mia:auc_standard_error",
        "eval.aggregate:task_aggregate",
        "eval.aggregate:final_score",
        "eval.bootstrap:intervals",
        "eval.bootstrap:paired_difference",
        "eval.forgetting:classify",
        "eval.forgetting:Judgement",
        "eval.forgetting:Verdict",
        "eval.forgetting:VerdictThresholds",
    ),
    "Plugins": (
        "trainers.objectives.custom:register_objective",
        "trainers.objectives.custom:made_up_rows",
        "merging.methods.custom:register_method",
        "merging.methods.combination:Combination",
        "eval.metrics:register_metric",
        "trainers.plugins:find_plugin",
        "trainers.plugins:use_plugins",
        "trainers.plugins:Plugin",
    ),
}
"""Heading to what stands below it, as ``module:name``."""

HEAD = """# Python API

What a program of your own would import, with its docstrings. Everything else may change with any version. Arguments behind `*` are given by
name. Shapes and units are in names: `_B` one value per row, `_N` one per scored token, `_s` seconds, `_gib` GiB. `python docs/make_api.py`
writes this page from the code, and a test fails when it is older.

Nothing here starts Ray but `run_sweep` and `unlearn`; modules below `trainers`, `merging` and `eval` never import it.
"""


@dataclass(frozen=True)
class Entry:
    """A public function or class: where it is, and its syntax tree."""

    module: str
    name: str
    node: ast.FunctionDef | ast.ClassDef


def entries(section: str) -> Iterator[Entry]:
    """What stands in a section of the page, in order.

    Raises:
        LookupError: if ``PUBLIC`` names something that does not exist.
    """
    for place in PUBLIC[section]:
        module, _, name = place.partition(":")
        tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
        found = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name]
        if not found:
            raise LookupError(f"{place} is listed as public, but does not exist")
        yield Entry(module, name, found[0])


def page() -> str:
    """The whole text of docs/api.md."""
    lines = [HEAD]
    for section in PUBLIC:
        lines += [f"## {section}\n"]
        for entry in entries(section):
            lines += [f"### `{entry.name}`\n", f"`from {entry.module} import {entry.name}`\n", *_described(entry.node)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def _described(node: ast.FunctionDef | ast.ClassDef) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef):
        yield _block(signature(node))
        yield _text(_doc(node))
        return
    shown, fields = _fields(node), []
    if shown:
        yield _block(f"class {node.name}({', '.join(ast.unparse(base) for base in node.bases)})".replace("()", ""))
    types = {
        one.target.id: ast.unparse(one.annotation)
        for one in node.body
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
    }
    yield _text(_doc(node), types=types)
    for name, annotation, default, meaning in shown:
        value = f"{name}: {annotation}" if annotation else name
        head = f"`{value}{f' = {default}' if default else ''}`"
        fields.append(_filled(head + (f": {_words(meaning)}" if meaning else ""), indent="- "))
    if fields:
        yield "\n".join(fields) + "\n"
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_") and (text := ast.get_docstring(method)):
            is_property = any(isinstance(one, ast.Name) and one.id == "property" for one in method.decorator_list)
            head = f"`.{method.name}`" if is_property else f"`.{' '.join(signature(method, bound=True).split())}`"
            yield f"{head}\n\n{_text(text)}"


def signature(node: ast.FunctionDef, *, bound: bool = False) -> str:
    """A function's head, on one line where it fits, else one argument a line."""
    arguments = ast.parse(ast.unparse(node)).body[0].args  # type: ignore[attr-defined]
    if bound and arguments.args and arguments.args[0].arg in ("self", "cls"):
        del arguments.args[0]
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"{node.name}({', '.join(_each(arguments))}){result}"
    if len(line) <= 110:
        return line
    return f"{node.name}(\n" + "".join(f"    {one},\n" for one in _each(arguments)) + f"){result}"


def _each(arguments: ast.arguments) -> Iterator[str]:
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(plain) - len(arguments.defaults)) + list(arguments.defaults)
    for argument, default in zip(plain, defaults, strict=True):
        yield _argument(argument, default)
    if arguments.vararg:
        yield f"*{ast.unparse(arguments.vararg)}"
    elif arguments.kwonlyargs:
        yield "*"
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield _argument(argument, default)
    if arguments.kwarg:
        yield f"**{ast.unparse(arguments.kwarg)}"


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    return ast.unparse(argument) + (f" = {ast.unparse(default)}" if default is not None else "")


def _fields(node: ast.ClassDef) -> list[tuple[str, str, str, str]]:
    """Name, type, default and meaning of each field or enum member; what the docstring's Args already say is left out."""
    documented = set(re.findall(r"^    (\w+): ", _args_of(_doc(node)), re.MULTILINE))
    found = []
    for index, item in enumerate(node.body):
        after = node.body[index + 1] if index + 1 < len(node.body) else None
        note = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
        meaning = inspect.cleandoc(note) if isinstance(note, str) else ""
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and not item.target.id.startswith("_"):
            default, described = _default(item.value)
            if item.target.id not in documented:
                found.append((item.target.id, ast.unparse(item.annotation), default, described or meaning))
        elif isinstance(item, ast.Assign) and isinstance(item.targets[0], ast.Name) and isinstance(item.value, ast.Constant):
            name = item.targets[0].id
            if not name.startswith("_") and name not in documented:
                found.append((name, "", ast.unparse(item.value), meaning))
    return found


def _default(value: ast.expr | None) -> tuple[str, str]:
    """A field's default, and the description that ``Field`` gives it."""
    if not (isinstance(value, ast.Call) and ast.unparse(value.func) in ("Field", "field")):
        return (ast.unparse(value) if value is not None else "", "")
    words = {keyword.arg: keyword.value for keyword in value.keywords}
    first = value.args[0] if value.args else words.get("default") or words.get("default_factory")
    given = "" if first is None or (isinstance(first, ast.Constant) and first.value is Ellipsis) else ast.unparse(first)
    if "default_factory" in words:
        given += "()"
    meaning = words.get("description")
    return given, ast.literal_eval(meaning) if meaning is not None else ""


def _doc(node: ast.FunctionDef | ast.ClassDef) -> str:
    text = ast.get_docstring(node)
    if not text:
        raise LookupError(f"{node.name} is public and has no docstring")
    return text


def _args_of(text: str) -> str:
    found = re.search(r"^Args:\n((?:    .*\n?|\n)*)", text, re.MULTILINE)
    return found[1] if found else ""


def _block(text: str) -> str:
    return f"```text\n{text}\n```\n"


def _words(text: str) -> str:
    """Double backticks become single ones, and one paragraph one line; what Markdown would take for markup is left alone by it."""
    parts = re.split(r"(`[^`]+`)", re.sub(r"``([^`]+)``", r"`\1`", " ".join(text.split())))
    return "".join(part if part.startswith("`") else part.replace("*", "\\*") for part in parts)


def _text(doc: str, *, types: Mapping[str, str] = MappingProxyType({})) -> str:
    """A docstring as Markdown: paragraphs, and its Args, Returns and Raises as lists; ``types`` are told with the names in Args."""
    result = []
    for paragraph in re.split(r"\n\s*\n", doc):
        lines = paragraph.splitlines()
        section = re.fullmatch(r"(Args|Returns|Raises|Yields):", lines[0])
        if section is None:
            result.append(_filled(_words(paragraph)))
            continue
        result.append({"Args": "Arguments", "Returns": "Returns", "Raises": "Raises", "Yields": "Yields"}[section[1]] + ":")
        items = _items(textwrap.dedent("\n".join(lines[1:])), named=section[1] in ("Args", "Raises"), types=types)
        result.append("\n".join(items))
    return "\n\n".join(result) + "\n"


def _items(text: str, *, named: bool, types: Mapping[str, str]) -> Iterator[str]:
    """One list item for each line that is not indented, with the indented lines below it."""
    for item in re.findall(r"^\S.*(?:\n[ \t]+.*)*", text, re.MULTILINE):
        head, colon, rest = item.partition(": ")
        if named and colon and "\n" not in head and re.fullmatch(r"[\w, ]+", head):
            names = [name.strip() for name in head.split(",")]
            shown = ", ".join(f"`{name}: {types[name]}`" if name in types else f"`{name}`" for name in names)
            yield _filled(f"{shown}: {_words(rest)}", indent="- ")
        else:
            yield _filled(_words(item), indent="- ")


def _filled(text: str, *, indent: str = "") -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent=indent, subsequent_indent=" " * len(indent), break_long_words=False, break_on_hyphens=False
    )


def main() -> None:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if docs/api.md is stale")
    check, text = parser.parse_args().check, page()
    if check and (not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text):
        sys.exit("docs/api.md is not what the docstrings say: run python docs/make_api.py")
    if not check:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
