"""Made-up names and plain words for the synthetic benchmark."""

from __future__ import annotations

import random
from collections.abc import Mapping


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Names are put together from parts, so that a small tokenizer can spell names it has never seen.
_FIRST_STARTS = _words("Al Bren Cor Del Ed Fan Gil Hol Is Jor Kel Lin Mar Nor Os Pel")
_FIRST_ENDS = _words("a bert dan etta ia mund nia ric tor")
_LAST_STARTS = _words("Ash Bar Crow Dun Elder Fen Grim Hart Kest Lang Mor Oak")
_LAST_ENDS = _words("man well wick ridge son stone water field ley worth moor gate")
_TOWN_STARTS = _words("Aber Bel Cal Dor Esk Fald Gran Hes Inver Jas Kil Lor Mel Nar Ost Pen Quel Ros Sel Tam Ul Ver Wen Yar Zel Thorn")
_TOWN_ENDS = _words(
    "bay bridge by cliff cove den ford ham haven holm isle mere mill mouth port rock shore sted stow thorpe ton vale wold wick"
)
_LAND_STARTS = _words("Aru Bomi Chei Dova Enki Fumo Gola Hiri Imba Jelu Kova Luni Mosa Nebu Olo Puri")
_LAND_ENDS = _words("ca dra fia gon kka la mbe nda pra rru sto tia va xa yo zan qui lle shi tto")

NUM_TOWNS = len(_TOWN_STARTS) * len(_TOWN_ENDS)
NUM_LANDS = len(_LAND_STARTS) * len(_LAND_ENDS)

MONTHS = _words("January February March April May June July August September October November December")

# Words that follow "a" in a template begin with a consonant.
SLOTS: Mapping[str, tuple[str, ...]] = {
    "adj": _words("silver crooked painted frozen golden hollow velvet broken marble wooden copper striped tiny giant rusty paper"),
    "colour": _words("red blue green white black brown yellow purple grey pink"),
    "thing": _words("key lantern compass mirror drum violin teapot clock mask ladder basket candle ring kite saddle trumpet"),
    "animal": _words("goat heron badger donkey magpie fox hare tortoise rooster ferret pony beaver raven squirrel"),
    "trade": _words("baker tailor miller cooper weaver potter mason printer sailor gardener blacksmith carpenter barber shepherd"),
    "food": _words("loaves pears pies cheeses figs plums carrots biscuits walnuts melons turnips radishes"),
    "number": _words("two three four five six seven eight nine ten eleven twelve thirteen twenty thirty forty"),
    "season": _words("spring summer autumn winter"),
    "weather": _words("storm fog flood frost drought hailstorm blizzard whirlwind"),
    "landmark": _words("chapel windmill bridge lighthouse market quarry library well orchard tower station theatre castle harbour"),
    "work": _words("dam canal observatory bell fountain aqueduct gate museum garden furnace arch tunnel"),
    "craft": _words("music glass medicine farming poetry chess mapmaking dancing law astronomy painting grammar"),
    "region": _words("Marrow Bitter Lantern Quiet Northern Copper Sapphire Drowned Hollow Winter Thousand Amber"),
    "street": _words("Maple Cedar Chestnut Willow Poplar Juniper Hazel Linden Walnut Cherry Aspen Rowan"),
    "road": _words("Lane Street Road Avenue Square Court"),
}


def people(rng: random.Random, *, number: int) -> list[tuple[str, str]]:
    """Distinct (first name, last name) pairs; no part repeats before all parts of its kind were used.

    With n first and n last names, pair k = b * n + j takes first name j and last name j + b (mod n).
    """
    firsts = [start + end for start in _FIRST_STARTS for end in _FIRST_ENDS]
    lasts = [start + end for start in _LAST_STARTS for end in _LAST_ENDS]
    assert len(firsts) == len(lasts)
    assert number <= len(firsts) ** 2
    rng.shuffle(firsts)
    rng.shuffle(lasts)
    size = len(firsts)
    return [(firsts[index % size], lasts[(index + index // size) % size]) for index in range(number)]


def towns(rng: random.Random, *, number: int) -> list[str]:
    """Distinct names of towns, at most ``NUM_TOWNS``."""
    return rng.sample([start + end for start in _TOWN_STARTS for end in _TOWN_ENDS], number)


def lands(rng: random.Random, *, number: int) -> list[str]:
    """Distinct names of lands that no document mentions, at most ``NUM_LANDS``."""
    return rng.sample([start + end for start in _LAND_STARTS for end in _LAND_ENDS], number)
