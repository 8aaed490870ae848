"""A sweep's plan as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from launcher.config import ExperimentConfig
from launcher.console import settings
from launcher.cost import gpu_time, order_longest_first
from launcher.data import PreparedData
from launcher.disk_plan import DiskPlan
from launcher.nodes import Node
from launcher.planner import ShardingPlan
from launcher.sweep_plan import SweepPlan, TrialPlan
from trainers.memory import GIB, describe_memory

_SHOWN_NODES = 4
_WIDTH = 12


def plan_lines(plan: SweepPlan, *, config: ExperimentConfig, data: PreparedData, disk: DiskPlan | None) -> list[str]:
    """Everything about a sweep before it starts, without its heading.

    Args:
        plan: of the sweep.
        config: the experiment.
        data: its rows.
        disk: what it writes; None if that is not known.
    """
    lines = [_line("run folder", config.run_uri or str(config.run_folder))]
    lines += [_line(name, f"{len(fold.forget)} forget rows, {len(fold.retain)} retain rows") for name, fold in data.folds.items()]
    lines.append(_line("trained on", f"{len(data.training.forget)} forget rows, {len(data.training.retain)} retain rows"))
    lines.append(_line("nodes", nodes_text(plan.planner.nodes)))
    lines.append(_line("engine", f"{config.train.engine.name}, {config.train.engine.dtype}"))
    for names, trial in _alike(plan):
        who = "" if len(names) == len(plan.specs) else f"{', '.join(names)}: "
        lines += [_line(label, who + text) for label, text in _trial_lines(trial)]
    lines.append(_line("resources", plan.resources.why))
    lines.append(_line("placement", _placement_text(plan)))
    lines.append(_line("order", order_text(plan)))
    lines.append(_line("work", work_text(plan, config=config)))
    lines.append(_line("disk", disk_text(disk, where=config.storage_path)))
    return lines + [f"  {spec.name}     {_spec_text(plan, name=spec.name) or 'defaults'}" for spec in plan.specs]


def plan_warnings(plan: SweepPlan, *, disk: DiskPlan | None, config: ExperimentConfig) -> list[str]:
    """What will probably go wrong."""
    found = []
    unfit = [name for name, trial in plan.trials.items() if trial.sharding is not None and not trial.sharding.fits]
    if unfit:
        found.append(
            f"{', '.join(unfit)} may not fit into the GPU's memory: lower train.per_device_train_batch_size, or set it and "
            "train.engine.ranks to null to let the planner choose"
        )
    if disk is not None and disk.is_short:
        assert disk.free is not None
        found.append(
            f"the run takes about {_size(disk.total)}, but {_size(disk.free)} are free at {config.storage_path}: free some space, "
            "set storage_path to a larger disk, or keep fewer checkpoints (train.checkpoints)"
        )
    return found


def nodes_text(nodes: Sequence[Node]) -> str:
    """``2 nodes: node-1 (16 CPU cores, 8 GPUs of 80.0 GiB); ...``: nodes that are alike are counted."""
    alike: dict[str, list[str]] = {}
    for node in nodes:
        gpus = ""
        if node.gpus:
            size = f" of {node.gpu_bytes / GIB:.1f} GiB" if node.gpu_bytes is not None else " of unknown memory"
            gpus = f", {node.gpus:g} GPU{'s' if node.gpus != 1 else ''}{size}" + (f" ({node.gpu_name})" if node.gpu_name else "")
        alike.setdefault(f"{node.cpus:g} CPU core{'s' if node.cpus != 1 else ''}{gpus}", []).append(node.name)
    texts = [f"{names[0]}: {kind}" if len(names) == 1 else f"{len(names)} nodes, each {kind}" for kind, names in alike.items()]
    more = f"; {len(texts) - _SHOWN_NODES} other kinds" if len(texts) > _SHOWN_NODES else ""
    return "; ".join(texts[:_SHOWN_NODES]) + more


def sharding_text(sharding: ShardingPlan) -> str:
    """``2 ranks, ZeRO-3, 4 pairs per pass, activations recomputed: why``."""
    stage = "plain torch" if sharding.zero_stage is None else f"ZeRO-{sharding.zero_stage}"
    ranks = f"{sharding.ranks} rank{'s' if sharding.ranks > 1 else ''}"
    pairs = f"{sharding.micro_batch} pair{'s' if sharding.micro_batch > 1 else ''} per pass"
    recomputes = "activations recomputed" if sharding.recomputes else "no recomputation"
    return f"{ranks}, {stage}, {pairs}, {recomputes}: {sharding.why}"


def order_text(plan: SweepPlan) -> str:
    """The trials with the longest first."""
    names = [spec.name for spec in order_longest_first(plan.specs, cost=plan.planner.cost)]
    if plan.total > len(names):
        return f"the first {len(names)}: {', '.join(names)}; then {plan.total - len(names)} that follow from them"
    return f"longest first: {', '.join(names)}"


def work_text(plan: SweepPlan, *, config: ExperimentConfig) -> str:
    """Operations of all trials, and hours where the GPUs are known ones."""
    specs = order_longest_first(plan.specs, cost=plan.planner.cost)
    flops = [plan.trials[spec.name].flops for spec in specs]
    known = [number for number in flops if number is not None]
    if len(known) < len(flops) or not known:
        note = next((trial.note for trial in plan.trials.values() if trial.note), "no trial")
        return f"not known: {note}"
    scale = plan.total / len(known)
    text = f"{plan.total} trials, {sum(known) * scale:.2g} FLOPs of training, the longest {max(known):.2g}"
    nodes = [node for node in plan.planner.nodes if node.gpus > 0]
    time = gpu_time(
        known,
        gpus_per_trial=plan.resources.gpus_per_trial,
        slots=plan.resources.concurrent,
        gpu_names=[node.gpu_name for node in nodes],
        dtype=config.train.engine.dtype,
    )
    if time is None:
        return text + "; no hours, because the speed of this hardware is not known"
    return f"{text}; {time.gpu_hours * scale:.2g} GPU-hours, {time.hours * scale:.2g} h from first to last (assumed: {time.assumed})"


def disk_text(disk: DiskPlan | None, *, where: str) -> str:
    """``3.2 GiB: checkpoints 2.1 GiB, ...; 120 GiB free at runs``."""
    if disk is None:
        return "not known: the target is still to be built, or not understood"
    parts = ", ".join(f"{name} {_size(size)}" for name, size in sorted(disk.parts.items(), key=lambda item: -item[1]))
    free = "" if disk.free is None else f"; {_size(disk.free)} free at {where}"
    return f"{_size(disk.total)}: {parts}{free}"


def _line(label: str, text: str) -> str:
    return f"  {label:<{_WIDTH}} {text}"


def _size(number: float) -> str:
    for unit, size in (("GiB", GIB), ("MiB", 2**20)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 2**10:.1f} KiB"


def _alike(plan: SweepPlan) -> Iterator[tuple[list[str], TrialPlan]]:
    """Trials that are computed alike, with one of their plans."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for spec in plan.specs:
        trial = plan.trials[spec.name]
        groups.setdefault(tuple(_trial_lines(trial)), []).append(spec.name)
    return ((names, plan.trials[names[0]]) for names in groups.values())


def _trial_lines(trial: TrialPlan) -> list[tuple[str, str]]:
    if trial.sharding is None:
        return [("memory", f"not predicted: {trial.note}")]
    capacity = trial.sharding.capacity_bytes
    of = "" if capacity is None else f"; a GPU has {capacity / GIB:.1f} GiB"
    return [("sharding", sharding_text(trial.sharding)), ("memory", describe_memory(trial.sharding.estimate) + of)]


def _placement_text(plan: SweepPlan) -> str:
    if plan.resources.strategy == "PACK":
        return "a trial is spread over nodes, as few as it can be (PACK)"
    return "a trial lies on one node (STRICT_PACK)"


def _spec_text(plan: SweepPlan, *, name: str) -> str:
    spec = next(spec for spec in plan.specs if spec.name == name)
    flops = plan.trials[name].flops
    text = settings(spec.overrides)
    return text if flops is None else f"{text or 'defaults'}  ({flops:.2g} FLOPs)"
