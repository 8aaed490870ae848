"""Which documents enter which score: train, validation and test folds that never cut a document."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence

from trainers.data.records import SETS, normalise_whitespace
from trainers.data.types import FOLDS, AttackDocuments, Document, ForgetRetain, Record
from trainers.errors import InputError

SCORED_FOLDS = ("validation", "test")
"""Folds that the membership attack is computed on."""


def split_by_document(records: Sequence[Record], *, fractions: Mapping[str, float], seed: int) -> dict[str, tuple[Record, ...]]:
    """Split rows into folds by document, each task in the given proportions.

    All rows of a document share a fold. The split depends on the documents' ids, the fractions and the
    seed, not on the order of the rows, which each fold keeps. Per task the number of documents in a fold is
    the fraction rounded by largest remainders, and at least one where the fraction is positive.

    Args:
        fractions: share of the documents in each of ``FOLDS``, summing to 1; a fold left out has share 0.

    Raises:
        InputError: if the fractions are no proportions, or a task has fewer documents than folds to fill.
    """
    fractions = _check_fractions(fractions)
    fold_of: dict[str, str] = {}
    for task, documents in shuffled_documents(records, seed=str(seed)).items():
        sizes = _fold_sizes(len(documents), fractions=fractions, task=task)
        homes = [fold for fold in FOLDS for _ in range(sizes[fold])]
        fold_of.update(zip(documents, homes, strict=True))
    return {fold: tuple(record for record in records if fold_of[record.document] == fold) for fold in FOLDS}


def shuffled_documents(records: Sequence[Record], *, seed: str) -> dict[str, list[str]]:
    """Each task's document ids in an order that depends on the ids and the seed alone, tasks by name.

    A document in two tasks (unusual, but legal) belongs to the first by name.
    """
    task_of: dict[str, str] = {}
    for record in records:
        task_of[record.document] = min(record.task, task_of.get(record.document, record.task))
    by_task: dict[str, list[str]] = {task: [] for task in sorted(set(task_of.values()))}
    for document in sorted(task_of):
        by_task[task_of[document]].append(document)
    for task, documents in by_task.items():
        random.Random(f"{seed}:{task}").shuffle(documents)
    return by_task


def shuffled_positions(documents: Sequence[Document], *, seed: str) -> list[int]:
    """Positions of attack documents in an order that depends on the documents and the seed alone."""
    order = sorted(range(len(documents)), key=lambda position: (documents[position].id, documents[position].text))
    random.Random(seed).shuffle(order)
    return order


def _check_fractions(fractions: Mapping[str, float]) -> dict[str, float]:
    for fold, fraction in fractions.items():
        if fold not in FOLDS:
            raise InputError(f"unknown fold {fold!r} in the fractions", why=f"the folds are {', '.join(FOLDS)}")
        if not 0 <= fraction <= 1:
            raise InputError(f"the fraction of the fold {fold!r} is {fraction}", fix="give a number from 0 to 1")
    total = math.fsum(fractions.values())
    if not abs(total - 1) <= 1e-6:
        shown = ", ".join(f"{fold} {fraction}" for fold, fraction in fractions.items())
        raise InputError(f"the fractions of the folds sum to {total:.6g}, not to 1", where=shown, fix="make them sum to 1")
    return {fold: fractions.get(fold, 0.0) for fold in FOLDS}


def _fold_sizes(num_documents: int, *, fractions: Mapping[str, float], task: str) -> dict[str, int]:
    used = [fold for fold in FOLDS if fractions[fold] > 0]
    if num_documents < len(used):
        raise InputError(
            f"{task} has {num_documents} document{'s' * (num_documents != 1)}, too few for {len(used)} folds ({', '.join(used)})",
            why="rows of one document never lie in two folds",
            fix="add documents, or set the fraction of a fold to 0",
        )
    quotas = {fold: num_documents * fractions[fold] for fold in used}
    sizes = {fold: math.floor(quota) for fold, quota in quotas.items()}
    by_remainder = sorted(used, key=lambda fold: sizes[fold] - quotas[fold])
    for fold in by_remainder[: num_documents - sum(sizes.values())]:
        sizes[fold] += 1
    for fold in used:
        if sizes[fold] == 0:
            sizes[max(used, key=lambda other: sizes[other])] -= 1
            sizes[fold] = 1
    return {fold: sizes.get(fold, 0) for fold in FOLDS}


def apply_splits(records: Sequence[Record], *, splits: Mapping[str, Sequence[str]], set_name: str) -> dict[str, tuple[Record, ...]]:
    """Split rows into the folds that list their ids; each fold keeps the order of the rows.

    Args:
        splits: fold -> row ids, for folds of ``FOLDS``.

    Raises:
        InputError: for an unknown fold, an id that is not in the data or in two folds, a document whose rows lie in two
            folds, or a row in no fold.
    """
    where = f"the fixed splits of the {set_name} set"
    fold_of: dict[str, str] = {}
    for fold, ids in splits.items():
        if fold not in FOLDS:
            raise InputError(f"unknown fold {fold!r}", where=where, why=f"the folds are {', '.join(FOLDS)}")
        for row_id in ids:
            if fold_of.setdefault(row_id, fold) != fold:
                raise InputError(f"the id {row_id!r} is listed in {fold_of[row_id]!r} and in {fold!r}", where=where, fix="list it once")
    known = {record.id for record in records}
    _raise_first([row_id for row_id in fold_of if row_id not in known], what="lists the id {!r}, which is not in the data", where=where)
    _raise_first([record.id for record in records if record.id not in fold_of], what="leaves the row {!r} in no fold", where=where)
    home: dict[str, Record] = {}
    for record in records:
        other = home.setdefault(record.document, record)
        if fold_of[other.id] != fold_of[record.id]:
            raise InputError(
                f"the document {record.document!r} lies in two folds: {other.id!r} in {fold_of[other.id]!r}, "
                f"{record.id!r} in {fold_of[record.id]!r}",
                where=where,
                why="a score would be read on text that another fold has shown",
                fix="list all rows of a document in one fold",
            )
    return {fold: tuple(record for record in records if fold_of[record.id] == fold) for fold in FOLDS}


def _raise_first(ids: Sequence[str], *, what: str, where: str) -> None:
    if ids:
        count = f" ({len(ids)} such {'id' if len(ids) == 1 else 'ids'} in all)"
        raise InputError(f"the split {what.format(ids[0])}{count}", where=where, fix="list every row of the data in exactly one fold")


def make_folds(
    data: ForgetRetain, *, splits: Mapping[str, Mapping[str, Sequence[str]]] | None, fractions: Mapping[str, float], seed: int
) -> dict[str, ForgetRetain]:
    """Both sets in folds (keys ``FOLDS``): by the fixed splits where they are given, else by a seeded split.

    Raises:
        InputError: as ``apply_splits`` and ``split_by_document`` do.
    """
    parts: dict[str, dict[str, tuple[Record, ...]]] = {}
    for name, records in zip(SETS, (data.forget, data.retain), strict=True):
        if splits is not None:
            parts[name] = apply_splits(records, splits=splits.get(name, {}), set_name=name)
            continue
        try:
            parts[name] = split_by_document(records, fractions=fractions, seed=seed)
        except InputError as error:
            raise InputError(error.what, where=error.where or f"the {name} set", why=error.why, fix=error.fix) from None
    return {fold: ForgetRetain(forget=parts["forget"][fold], retain=parts["retain"][fold]) for fold in FOLDS}


def split_attack(attack: AttackDocuments, *, folds: Mapping[str, ForgetRetain], seed: int) -> dict[str, AttackDocuments]:
    """Split the attack's documents into a validation and a test half; disjoint, and nothing is lost.

    A member goes where the forget record with its text is scored; members that are scored nowhere go to the two halves by
    turns. Where fewer than two members are found in either fold (in LUME all of them are train documents), all members are
    halved by the seed. Non-members are divided in the members' proportion, by the seed. Order is kept.

    Raises:
        InputError: if there are fewer than two members or non-members.
    """
    for name, documents in (("members", attack.members), ("non-members", attack.nonmembers)):
        if len(documents) < 2:
            raise InputError(
                f"the membership attack has {len(documents)} {name}",
                why="one half selects, the other gives the final number",
                fix="give at least two of each",
            )
    fold_of = {normalise_whitespace(record.text): fold for fold in SCORED_FOLDS if fold in folds for record in folds[fold].forget}
    # Positions, not documents: nothing may be lost where a document is given twice.
    homes = {position: fold_of.get(normalise_whitespace(member.text)) for position, member in enumerate(attack.members)}
    found = Counter(homes.values())
    order = shuffled_positions(attack.members, seed=f"{seed}:members")
    if min(found[fold] for fold in SCORED_FOLDS) >= 2:
        elsewhere = [position for position in order if homes[position] is None]
        homes.update({position: SCORED_FOLDS[turn % 2] for turn, position in enumerate(elsewhere)})
    else:
        homes = {position: SCORED_FOLDS[turn >= len(order) // 2] for turn, position in enumerate(order)}
    share = sum(home == "validation" for home in homes.values()) / len(homes)
    order = shuffled_positions(attack.nonmembers, seed=f"{seed}:nonmembers")
    num_validation = min(max(1, round(len(order) * share)), len(order) - 1)
    chosen = set(order[:num_validation])
    return {
        fold: AttackDocuments(
            members=tuple(member for position, member in enumerate(attack.members) if homes[position] == fold),
            nonmembers=tuple(other for position, other in enumerate(attack.nonmembers) if (position in chosen) == (fold == "validation")),
        )
        for fold in SCORED_FOLDS
    }
