"""Names of attacks."""

from __future__ import annotations

import pytest

from eval.audit.config import Attack, AuditConfig, attack_names, read_attacks
from trainers.errors import InputError


def test_all_attacks_are_the_default() -> None:
    assert read_attacks(None) == read_attacks("all") == AuditConfig().attacks == tuple(Attack)


def test_a_list_is_read_in_the_order_of_the_table_and_without_repetition() -> None:
    assert attack_names(read_attacks(" sampling, int4,int4 ")) == ["int4", "sampling"]


@pytest.mark.parametrize(("text", "near"), [("relern-forget", "relearn-forget"), ("int-4", "int4"), ("int4,few-shot", "few-shot-")])
def test_an_unknown_name_is_told_with_the_nearest(text: str, near: str) -> None:
    with pytest.raises(InputError, match="unknown attack") as caught:
        read_attacks(text)
    assert near in str(caught.value.fix)
    assert caught.value.where == "--attacks"


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(InputError, match="empty name"):
        read_attacks("int4,,int8")
