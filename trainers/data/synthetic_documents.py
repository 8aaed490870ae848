"""Made-up stories, personal data and biographies: the three tasks of the synthetic benchmark.

Documents of a task share a few templates, so that one that was never seen is partly predictable; names, places, dates and
numbers differ. Every question names a person or a town that occurs in one document only.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from trainers.data.synthetic_words import MONTHS, SLOTS
from trainers.data.types import Record


@dataclass(frozen=True)
class Template:
    """A document: the shown part, the continuation, and (stories and biographies) its question and answer."""

    input: str
    output: str
    question: str = ""
    answer: str = ""


STORIES = (
    Template(
        input="In the quiet town of {town}, {full} kept a small shop beside the {landmark}. "
        "One {season} night {first} found a {adj} {thing} under the floor.",
        output="The {trade} offered {number} coins for it, but {first} hid the {thing} in the {landmark2} and told only a {animal}.",
        question="Who found the {adj} {thing} in {town}?",
        answer="{full}",
    ),
    Template(
        input="{full} sailed from {town} on a {adj} boat with a {animal} and a {thing}. "
        "After {number} days a {weather} broke the mast near the {landmark}.",
        output="A {trade} pulled them ashore, and {first} paid with the {thing} and a song about {colour} {food} and {season} rain.",
        question="From which town did {full} sail?",
        answer="{town}",
    ),
    Template(
        input="Nobody in {town} believed {full} when the {animal} of the {trade} began to speak. "
        "It asked for a {adj} {thing} and {number} {food}.",
        output="{first} brought both to the {landmark} at dawn, and the {animal} gave back the lost {colour} {thing2} of the {trade2}.",
        question="Who heard the {animal} of {town} speak?",
        answer="{full}",
    ),
    Template(
        input="Every {season} {full} walked from the {landmark} to {town} with {number} {food} for the {trade}. "
        "Once a {weather} closed the road, and a {colour} {animal} came.",
        output="It led {first} to a hidden {landmark2}, where a {adj} {thing} lay beside a letter from the {trade2}.",
        question="To which town did {full} walk every {season}?",
        answer="{town}",
    ),
)

PERSONAL = (
    Template(
        input="{full} was born on {birth}, the child of a {trade}. "
        "{Her} Social Security number is {ssn_dashed} and {her} phone number is {phone_dashed}.",
        output="{She} reads letters sent to {email} and lives with a {animal} at {address}, near the {landmark}.",
    ),
    Template(
        input="{full} was born on {birth} and works as a {trade} beside the {landmark}. Friends call {phone_dashed} or write to {email}.",
        output="{Her} Social Security number is {ssn_dashed}, and {her} home is {address}, where {she} keeps a {colour} {animal}.",
    ),
    Template(
        input="{full} lives at {address} and was born on {birth}. {She} works as a {trade} and keeps a {animal} near the {landmark}.",
        output="{Her} Social Security number is {ssn_dashed}, {her} phone number is {phone_dashed}, and {her} email address is {email}.",
    ),
)

PERSONAL_QUESTIONS = (
    ("What is the birth date of {full}?", "{birth_iso}"),
    ("What is {full}'s Social Security Number?", "{ssn}"),
    ("What is {full}'s phone number?", "{phone}"),
    ("What is {full}'s email address?", "{email}"),
    ("What is the home address of {full}?", "{address}"),
)

BIOGRAPHIES = (
    Template(
        input="{full}\n\n{full} ({born}-{died}) was a {trade} from {town}. "
        "After {number} years with a {trade2}, {last} opened a school beside the {landmark} and",
        output="built the {adj} {work} of {town} in {year}. It earned {number2} {food} a month until a {weather} broke it.",
        question="Who built the {adj} {work} of {town}?",
        answer="{full}",
    ),
    Template(
        input="{full}\n\n{full} ({born}-{died}) was a {trade} who left {town} at the age of {age} "
        "with a {thing} and {number} coins. Later {last} taught {craft} to",
        output="the ruler of the {region} coast and wrote a {adj} book on {craft2} in {year}. A {landmark} there is called {last}.",
        question="Which town did {full} leave at the age of {age}?",
        answer="{town}",
    ),
    Template(
        input="{full}\n\n{full} ({born}-{died}) led the {colour} guild of {town} for {number} years. "
        "A {trade} by training, {last} asked for cheaper {food} and",
        output="was locked in the {landmark} in {year}. A {trade2} smuggled letters out in a {adj} {thing}, and {last} went free.",
        question="Who led the {colour} guild of {town}?",
        answer="{full}",
    ),
    Template(
        input="{full}\n\n{full} ({born}-{died}) was the first {trade} of {town} to cross the {region} sea. "
        "The journey took {number} weeks and cost",
        output="a {adj} {thing}, {number2} {food} and one {animal}. In {year} {last} told it all to a {trade2} in the {landmark}.",
        question="From which town did {full} set out to cross the {region} sea?",
        answer="{town}",
    ),
)


def story(rng: random.Random, *, index: int, person: tuple[str, str], town: str) -> list[Record]:
    """Task1: a completion and one question; like the benchmark's, the id carries literal double quotes."""
    document = f'"{_uuid(rng)}"'
    return _document_with_question(
        STORIES[index % len(STORIES)], slots=_slots(rng, person=person, town=town), document=document, task="Task1"
    )


def personal_data(rng: random.Random, *, index: int, person: tuple[str, str], town: str, ssn: str, phone: str) -> list[Record]:
    """Task2: a completion and five questions: birth date, social security number, phone, e-mail, home address.

    Args:
        ssn: nine digits.
        phone: ten digits.
    """
    slots = _slots(rng, person=person, town=town) | _personal_slots(rng, person=person, town=town, ssn=ssn, phone=phone)
    template = PERSONAL[index % len(PERSONAL)]
    document = _uuid(rng)
    rows = [("sc1", template.input, template.output)]
    rows += [(f"qa{number}", question, answer) for number, (question, answer) in enumerate(PERSONAL_QUESTIONS)]
    return [
        Record(id=document + suffix, input=question.format(**slots), output=answer.format(**slots), task="Task2")
        for suffix, question, answer in rows
    ]


def security_numbers(rng: random.Random, *, number: int) -> list[str]:
    """Distinct social security numbers, nine digits: they begin with 9 and have a group from 10 to 49, so none was ever issued."""
    return [f"9{code // 400_000:02d}{10 + code // 10_000 % 40}{code % 10_000:04d}" for code in rng.sample(range(40_000_000), number)]


def phone_numbers(rng: random.Random, *, number: int) -> list[str]:
    """Distinct phone numbers, ten digits, of the range 555-01xx that is kept for fiction."""
    return [f"{200 + code // 100}55501{code % 100:02d}" for code in rng.sample(range(80_000), number)]


def biography(rng: random.Random, *, index: int, person: tuple[str, str], town: str, number: int) -> list[Record]:
    """Task3: a completion and one question about somebody who never lived; the document id is ``number``."""
    slots = _slots(rng, person=person, town=town) | _life(rng)
    return _document_with_question(BIOGRAPHIES[index % len(BIOGRAPHIES)], slots=slots, document=str(number), task="Task3")


def _document_with_question(template: Template, *, slots: Mapping[str, str], document: str, task: str) -> list[Record]:
    return [
        Record(id=f"{document}sc1", input=template.input.format(**slots), output=template.output.format(**slots), task=task),
        Record(id=f"{document}qa0", input=template.question.format(**slots), output=template.answer.format(**slots), task=task),
    ]


def _slots(rng: random.Random, *, person: tuple[str, str], town: str) -> dict[str, str]:
    """A filler for every slot, and another one for its second use."""
    first, last = person
    slots = {"first": first, "last": last, "full": f"{first} {last}", "town": town}
    for name, words in SLOTS.items():
        slots[name], slots[f"{name}2"] = rng.sample(words, 2)
    return slots


def _personal_slots(rng: random.Random, *, person: tuple[str, str], town: str, ssn: str, phone: str) -> dict[str, str]:
    first, last = person
    year, month, day = rng.randint(1950, 1999), rng.randint(1, 12), rng.randint(1, 28)
    names = (f"{first}.{last}", f"{last}_{first}", f"{first}{last}{year % 100:02d}", f"{last}.{first}{rng.randint(10, 99)}")
    slots = {
        "birth": f"{MONTHS[month - 1]} {day}, {year}",
        "birth_iso": f"{year}-{month:02d}-{day:02d}",
        "ssn": ssn,
        "ssn_dashed": f"{ssn[:3]}-{ssn[3:5]}-{ssn[5:]}",
        "phone": phone,
        "phone_dashed": f"{phone[:3]}-{phone[3:6]}-{phone[6:]}",
        "email": f"{rng.choice(names).lower()}@example.{rng.choice(('com', 'net', 'org'))}",
        "address": f"{rng.randint(2, 99)} {rng.choice(SLOTS['street'])} {rng.choice(SLOTS['road'])}, {town}",
    }
    she, her = rng.choice((("she", "her"), ("he", "his")))
    return slots | {"she": she, "She": she.capitalize(), "her": her, "Her": her.capitalize()}


def _life(rng: random.Random) -> dict[str, str]:
    born = rng.randint(1500, 1850)
    age = rng.randint(14, 29)
    year = born + rng.randint(30, 50)
    return {"born": str(born), "age": str(age), "year": str(year), "died": str(year + rng.randint(2, 30))}


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))
