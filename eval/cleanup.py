"""What the benchmark does to texts between generation and scoring: ten replacements, and a way through CSV files."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

_REPLACEMENTS = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


def clean_up(text: str) -> str:
    """Remove the spaces that word-level tokenizers leave before punctuation and contractions, in the benchmark's order.

    transformers 5 ignores ``clean_up_tokenization_spaces=True`` for byte-level BPE tokenizers, while the version of the benchmark
    applied it; doing it here, once, gives the same text under both.
    """
    for old, new in _REPLACEMENTS:
        text = text.replace(old, new)
    return text


def columns_through_csv(columns: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Whole columns as pandas gives them back from a CSV file, each cell as text again: what the benchmark's script scores.

    The 19 words for a missing value, the empty text among them, become ``nan``. A column that holds nothing but numbers (or truth
    values) is read as such: ``007`` becomes ``7``, and ``7`` in a column with a missing cell ``7.0``.

    Args:
        columns: texts by column name, at least two columns of the same length.

    Source: https://pandas.pydata.org/docs/reference/api/pandas.read_csv.html (na_values)
    """
    import pandas

    # Quotes around every cell change nothing in what is read back, but for a lone carriage return: without them it ends the row
    # under Python before 3.11.9 and 3.12.3 (https://github.com/python/cpython/pull/115741).
    file = io.StringIO(pandas.DataFrame(dict(columns)).to_csv(index=False, quoting=csv.QUOTE_ALL), newline="")
    frame = pandas.read_csv(file)
    return {name: [str(cell) for cell in frame[name]] for name in columns}
