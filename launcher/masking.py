"""Hiding what strangers must not read: personal data in texts, keys and places of a machine in settings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

DOT = "•"

_EMAIL = re.compile(r"[\w.+\\\-]+@[\w\-\\]+(?:\.[\w\-]+)+")
_YEARS = r"(?:1[5-9]|20)\d\d\s?[-–/]\s?(?:1[5-9]|20)\d\d(?!\s?[-–/.]?\d)"
# Seven or more digits with at most two separators between neighbours: social security and phone numbers, ISO dates.
_NUMBER = re.compile(rf"(?<!\d)(?!\(?{_YEARS})\+?\(?\d(?:[-.\s()/]{{0,2}}\d){{6,}}")
_STREET_WORDS = (
    "Street|St|Avenue|Ave|Road|Rd|Place|Pl|Drive|Dr|Lane|Ln|Boulevard|Blvd|Court|Ct|Way|Circle|Cir|Terrace|Ter|"
    "Parkway|Pkwy|Highway|Hwy|Trail|Square|Sq|Alley|Row|Loop|Crescent|Close|Gardens"
)
# House number, up to five words, street word, then what belongs to it: flat number, town, state and postal code.
_STREET = re.compile(
    rf"\b\d+[A-Za-z]?\s+(?:[\w.'’\-]+\s+){{0,5}}?(?:{_STREET_WORDS})\b\.?(?:\s?,?\s?(?:#|Apt\.?|Unit|Suite)\s?\w+)?"
    rf"(?:,\s?[\w.' ]{{1,40}}?){{0,2}}(?:,?\s+\d{{5}}(?:-\d{{4}})?)?",
    re.IGNORECASE,
)
_POSTAL = re.compile(r"\b[A-Z]{2},?\s+\d{5}(?:-\d{4})?\b")


def _dot_digits(match: re.Match[str]) -> str:
    return re.sub(r"\d", DOT, match.group())


def _dot_email(match: re.Match[str]) -> str:
    return re.sub(r"\w", DOT, match.group())


def mask_personal_data(text: str) -> str:
    """Replace e-mail addresses and the digits of long numbers and street addresses by dots; the length stays."""
    text = _EMAIL.sub(_dot_email, text)
    for pattern in (_STREET, _POSTAL, _NUMBER):
        text = pattern.sub(_dot_digits, text)
    return text


def mask_answer(text: str) -> str:
    """Everything but the first letter of a short personal answer replaced by dots, a first digit too; spaces stay."""
    stripped = text.lstrip()
    return re.sub(r"\d", DOT, stripped[:1]) + re.sub(r"\S", DOT, stripped[1:])


def mask_row_text(text: str, *, task: str, kind: str, is_answer: bool) -> str:
    """Mask one text of an evaluation row.

    Args:
        text: the prompt, the expected answer or a generated answer.
        task: ``Task2`` rows are biographies made of personal data: none of their digits is shown.
        kind: ``qa`` or ``sc``; the answers to ``Task2`` questions keep their first letter only.
        is_answer: whether the text is an answer (expected or generated) rather than a prompt.
    """
    if task.strip().lower() != "task2":
        return mask_personal_data(text)
    if is_answer and kind != "sc":
        return mask_answer(text)
    return re.sub(r"\d", DOT, mask_personal_data(text))


# ---- keys and places of a machine

HIDDEN = "(hidden)"

_SECRET_NAME = re.compile(r"(api_?key|(^|[._-])key$|(^|[._-])token$|secret|password|passwd|credential)", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|ACCESS_KEY_ID)$", re.IGNORECASE)
_SHORTEST_SECRET = 12
"""Characters; what is shorter is a word that a text may hold by chance."""


def names_secret(name: str) -> bool:
    """Whether a setting of this name holds a key, such as ``api_key`` or ``hub.token``; ``max_new_tokens`` does not."""
    return bool(_SECRET_NAME.search(name))


def redact(value: Any, *, key: str = "") -> Any:
    """The same value without anything whose key names a secret."""
    if isinstance(value, Mapping):
        return {str(name): redact(item, key=str(name)) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item, key=key) for item in value]
    return HIDDEN if isinstance(value, str) and value and names_secret(key) else value


def secrets_of(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The values of variables whose names end in KEY, TOKEN, SECRET, PASSWORD or the like, longest first.

    A value that is a path is no secret: ``SSH_KEY=/home/me/.ssh/id`` says where a key lies.
    """
    values = {value for name, value in environment.items() if _SECRET_VARIABLE.search(name)}
    return tuple(sorted((value for value in values if len(value) >= _SHORTEST_SECRET and value[0] not in "/~."), key=len, reverse=True))


def hide_secrets(text: str, *, secrets: Sequence[str]) -> str:
    """The text with every secret replaced."""
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return text


def hide_places(value: Any) -> Any:
    """The same value with the last part only of every path, because the rest tells about a machine and its user.

    A name with one slash, such as ``allenai/OLMo-1B``, is taken for a model of a hub and stays.
    """
    if isinstance(value, Mapping):
        return {str(name): hide_places(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [hide_places(item) for item in value]
    if isinstance(value, str) and (value.startswith(("/", "~", "./", "../")) or value.count("/") > 1):
        return f"…/{value.rstrip('/').rpartition('/')[2]}"
    return value
