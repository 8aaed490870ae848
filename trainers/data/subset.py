"""A small part of a data set that keeps whole documents, every task, and members to attack."""

from __future__ import annotations

from collections.abc import Sequence

from trainers.data.folds import shuffled_documents, shuffled_positions
from trainers.data.records import SETS, normalise_whitespace
from trainers.data.types import AttackDocuments, ForgetRetain, Record
from trainers.errors import InputError


def subset_documents(data: ForgetRetain, *, documents_per_task: int, seed: int, prefer: frozenset[str] = frozenset()) -> ForgetRetain:
    """That many documents of each task of each set, drawn by the seed; a task with fewer keeps them all.

    Rows keep their order, and the draw does not depend on it.

    Args:
        prefer: texts of attack members, white space normalised; forget documents that hold one are drawn first, so that
            the attack keeps members.

    Raises:
        InputError: if ``documents_per_task`` < 1.
    """
    if documents_per_task < 1:
        raise InputError(f"documents_per_task is {documents_per_task}", fix="ask for at least one document per task")
    parts = {
        name: _draw(records, number=documents_per_task, seed=f"{seed}:{name}", prefer=prefer if name == "forget" else frozenset())
        for name, records in zip(SETS, (data.forget, data.retain), strict=True)
    }
    return ForgetRetain(forget=parts["forget"], retain=parts["retain"])


def _draw(records: Sequence[Record], *, number: int, seed: str, prefer: frozenset[str]) -> tuple[Record, ...]:
    preferred = {record.document for record in records if prefer and normalise_whitespace(record.text) in prefer}
    chosen: set[str] = set()
    for documents in shuffled_documents(records, seed=seed).values():
        # The sort is stable: preferred documents come first, both parts stay in drawn order.
        chosen.update(sorted(documents, key=lambda document: document not in preferred)[:number])
    return tuple(record for record in records if record.document in chosen)


NONMEMBERS_PER_MEMBER = 4
"""A small attack is steadied by more strangers, which cost a forward pass each and no training."""


def subset_attack(attack: AttackDocuments, *, data: ForgetRetain, seed: int) -> AttackDocuments:
    """The members whose text the forget set still holds, and four times as many non-members (all, if there are fewer), drawn by the seed.

    Raises:
        InputError: if fewer than two members or non-members remain.
    """
    texts = {normalise_whitespace(record.text) for record in data.forget}
    members = tuple(member for member in attack.members if normalise_whitespace(member.text) in texts)
    for name, number in (("members", len(members)), ("non-members", len(attack.nonmembers))):
        if number < 2:
            raise InputError(
                f"only {number} {name} of the membership attack remain",
                why=f"{len(attack.members)} members were given; a member is kept if its text is that of a forget row",
                fix="keep more documents per task, or give members that are documents of the forget set",
            )
    order = shuffled_positions(attack.nonmembers, seed=f"{seed}:nonmembers")
    chosen = set(order[: NONMEMBERS_PER_MEMBER * len(members)])
    return AttackDocuments(members=members, nonmembers=tuple(item for position, item in enumerate(attack.nonmembers) if position in chosen))
