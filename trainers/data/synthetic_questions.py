"""Multiple-choice questions about lands that do not exist, in the layout of MMLU."""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Mapping

from trainers.data.synthetic_words import NUM_LANDS, lands

LETTERS = "ABCD"
NUM_DEV = 5
"""Solved questions per subject, as published."""
MAX_QUESTIONS = NUM_LANDS - NUM_DEV

_GOODS = "salt,wool,timber,copper,glass,barley,honey,paper,silk,coal"
_HOURS = "one hour,two hours,three hours,four hours,five hours,six hours"
_BIRDS = "herons,gulls,owls,cranes,swans,larks,crows,finches"
_WOODS = "oak,pine,cedar,birch,walnut,maple,ash,elm"
_COLOURS = "red,blue,green,white,black,yellow,orange,purple"
_TIMES = "at dawn,at noon,at dusk,at midnight"
_DIRECTIONS = "north,south,east,west"
_METALS = "copper,tin,silver,iron,brass,lead,gold,bronze"

SUBJECTS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "world_geography": (
        ("In which direction does the longest river of {land} flow on its way from the hills to the sea?", _DIRECTIONS),
        ("Which of these goods do most of the ships carry away from the great harbour of {land}?", _GOODS),
        (
            "What covers most of the wide country between the mountains and the coast of {land}?",
            "forest,desert,marsh,meadow,ice,heath,sand",
        ),
    ),
    "kitchen_science": (
        ("Which fuel do the cooks of {land} burn when they boil the soup for the summer festival?", "peat,coal,straw,charcoal,oil,wood"),
        ("How long do the bakers of {land} let their dark dough rest before they put it in?", _HOURS),
        (
            "Which plant turns the flat bread of {land} bright yellow when it is baked in clay?",
            "saffron,mustard,ginger,mint,fennel,thyme,clover",
        ),
    ),
    "garden_lore": (
        ("At what time of the day do the gardeners of {land} water the roses along the wall?", _TIMES),
        ("Which colour are the first flowers that open after the snow in the parks of {land}?", _COLOURS),
        ("Which tree do the people of {land} plant beside the door of a newly built house?", _WOODS),
    ),
    "sea_travel": (
        ("Towards which direction do the sailors of {land} turn when they see the first evening star?", _DIRECTIONS),
        ("Which wood do the shipbuilders of {land} choose for the tall mast of a fishing boat?", _WOODS),
        ("Which colour is the lamp that ships from {land} must show when they carry a pilot?", _COLOURS),
    ),
    "old_crafts": (
        ("Which metal do the smiths of {land} melt when they cast the large bell of a town?", _METALS),
        ("Which of these goods do the weavers of {land} receive as their wages at the yearly fair?", _GOODS),
        ("Which colour do the dyers of {land} keep for the coat of a newly chosen mayor?", _COLOURS),
    ),
    "weather_signs": (
        ("From which direction does the wind blow over {land} on the day before the great rain?", _DIRECTIONS),
        ("At what time of the day does the thick summer fog leave the valleys of {land}?", _TIMES),
        ("Which birds fly low over the fields of {land} when a storm is on its way?", _BIRDS),
    ),
    "animal_life": (
        ("Which birds build their nests on the roofs of {land} in the last week of spring?", _BIRDS),
        ("At what time of the day do the wild horses of {land} come down to drink?", _TIMES),
        ("What do the small brown bears of {land} eat most in the weeks before winter?", "nuts,fish,berries,roots,honey,grass,mushrooms"),
    ),
    "folk_music": (
        ("Which instrument leads the slow dance at a wedding in the mountain villages of {land}?", "fiddle,flute,drum,harp,bagpipe,horn"),
        ("Which metal is used for the strings of the round lute that players of {land} love?", _METALS),
        ("How long does the song of the harvest last when it is sung in {land}?", _HOURS),
    ),
}
"""Subject -> (question, choices to draw four from)."""


def subject_files(rng: random.Random, *, subject: str, num_test: int) -> dict[str, str]:
    """Text of ``dev/<subject>_dev.csv`` and ``test/<subject>_test.csv``; no land occurs twice.

    Right answers fall on A to D equally often, as far as the number allows.
    """
    names = lands(rng, number=NUM_DEV + num_test)
    files = {}
    for fold, chosen in (("dev", names[:NUM_DEV]), ("test", names[NUM_DEV:])):
        letters = [LETTERS[index % len(LETTERS)] for index in range(len(chosen))]
        rng.shuffle(letters)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        for index, (land, letter) in enumerate(zip(chosen, letters, strict=True)):
            question, choices = SUBJECTS[subject][index % len(SUBJECTS[subject])]
            # The four are drawn in random order, so that whichever stands at the letter is right.
            writer.writerow([question.format(land=land), *rng.sample(choices.split(","), 4), letter])
        files[f"{fold}/{subject}_{fold}.csv"] = text.getvalue()
    return files
