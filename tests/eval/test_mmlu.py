"""Reading MMLU, choosing questions, writing prompts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from eval.mmlu import MmluData, Question, as_pandas_reads, load_mmlu, mmlu_prompt, split_mmlu, subset_mmlu, training_texts
from trainers.errors import InputError

DATA = Path(os.environ.get("UNLEARN_TEST_DATA") or Path(__file__).parents[3] / "shared" / "data")
BIOLOGY = "high_school_biology"
needs_data = pytest.mark.skipif(not (DATA / "mmlu").is_dir(), reason="the published MMLU files are not at hand")


def question(row: int, *, subject: str = BIOLOGY, answer: str = "B", text: str = "Why?") -> Question:
    return Question(subject=subject, row=row, question=text, choices=("one", "two", "three", "None"), answer=answer)


def some(counts: dict[str, int]) -> MmluData:
    return MmluData(
        dev={subject: tuple(question(i, subject=subject) for i in range(1, 6)) for subject in counts},
        test={subject: tuple(question(i, subject=subject) for i in range(1, n + 1)) for subject, n in counts.items() if n},
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    for part in ("dev", "test"):
        (tmp_path / part).mkdir()
        (tmp_path / part / f"bio_{part}.csv").write_text('"What, now?\nWell?",a,b,c,None,D\nWhy?,1,2,3,4,A\n')
    return tmp_path


def test_the_prompt_is_the_published_one_with_two_spaces_after_about():
    dev = (question(1, answer="C", text="How?"), question(2, answer="A"))
    assert mmlu_prompt(subject="high_school_biology", question=question(3, text="Where?"), dev=dev, shots=1) == (
        "The following are multiple choice questions (with answers) about  high school biology.\n\n"
        "How?\nA. one\nB. two\nC. three\nD. None\nAnswer: C\n\n"
        "Where?\nA. one\nB. two\nC. three\nD. None\nAnswer:"
    )


def test_a_folder_is_read_with_its_quoted_commas_and_line_ends(folder):
    data = load_mmlu(folder)
    assert data.questions[0] == Question(subject="bio", row=1, question="What, now?\nWell?", choices=("a", "b", "c", "None"), answer="D")
    assert [q.id for q in data.questions] == ["bio/1", "bio/2"]


def test_whole_columns_of_numbers_are_read_as_numbers(folder):
    """Column A holds 1.50 and 2: pandas reads floats; column B holds 007 and a word: it stays text."""
    (folder / "test" / "bio_test.csv").write_text("Q?,1.50,007,c,d,A\nR?,2,word,c,d,B\n")
    data = load_mmlu(folder)
    assert [question.choices for question in data.questions] == [("1.50", "007", "c", "d"), ("2", "word", "c", "d")]
    assert [question.choices for question in as_pandas_reads(data).questions] == [("1.5", "007", "c", "d"), ("2.0", "word", "c", "d")]


def test_a_choice_none_becomes_nan_only_as_pandas_reads_it(folder):
    data = load_mmlu(folder)
    assert as_pandas_reads(data).questions[0].choices == ("a", "b", "c", "nan")
    assert as_pandas_reads(data).questions[1].choices == ("1", "2", "3", "4.0"), "None and 4 are a column of numbers"
    assert as_pandas_reads(data).questions[1].question == data.questions[1].question == "Why?"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "dev" / "bio_dev.csv").unlink(), "bio_dev.csv"),
        (lambda f: (f / "test" / "bio_test.csv").unlink(), "_test.csv"),
        (lambda f: (f / "test" / "bio_test.csv").write_text("q,a,b,c,d,A\nq,a,b,c,A\n"), "bio_test.csv, line 2"),
        (lambda f: (f / "test" / "bio_test.csv").write_text("q,a,b,c,d,E\n"), "'E'"),
        (lambda f: (f / "test" / "bio_test.csv").write_bytes(b"q,\xff,b,c,d,A\n"), "UTF-8"),
    ],
)
def test_a_damaged_folder_is_refused_with_file_and_line(folder, damage, message):
    damage(folder)
    with pytest.raises(InputError, match=message):
        load_mmlu(folder)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="no folder 'dev'"):
        load_mmlu(tmp_path / "nowhere")


def test_halves_are_disjoint_complete_and_even_per_subject():
    data = some({"a": 10, "b": 7, "c": 1})
    halves = split_mmlu(data, seed=3)
    ids = {name: {q.id for q in half.questions} for name, half in halves.items()}
    assert not ids["validation"] & ids["test"]
    assert ids["validation"] | ids["test"] == {q.id for q in data.questions}
    assert {s: len(q) for s, q in halves["validation"].test.items()} == {"a": 5, "b": 3, "c": 1}
    assert {s: len(q) for s, q in halves["test"].test.items()} == {"a": 5, "b": 4}
    assert split_mmlu(data, seed=3) == halves
    assert split_mmlu(data, seed=4) != halves


def test_many_subjects_of_one_question_each_are_halved_too():
    """The odd question of a subject goes to the half that has fewer so far."""
    halves = split_mmlu(some(dict.fromkeys("abcdef", 1)), seed=0)
    assert [len(halves[name].questions) for name in ("validation", "test")] == [3, 3]


def test_a_subset_is_spread_over_the_subjects():
    subset = subset_mmlu(some({"a": 50, "b": 50, "c": 2, "d": 0}), questions=12, seed=0)
    assert {s: len(q) for s, q in subset.test.items()} == {"a": 5, "b": 5, "c": 2}
    assert set(subset.dev) == set(subset.test)


def test_a_subset_of_fewer_questions_than_subjects_leaves_subjects_out():
    subset = subset_mmlu(some(dict.fromkeys("abcdef", 3)), questions=2, seed=0)
    assert sorted(map(len, subset.test.values())) == [1, 1]


def test_a_subset_keeps_to_its_word_limit():
    """A question of three words and four choices of one word has seven."""
    long, short = question(1, text="one two three"), question(2, text="why")
    data = MmluData(dev={BIOLOGY: (long, short)}, test={BIOLOGY: (long, short)})
    assert subset_mmlu(data, questions=5, seed=0, max_words=6) == MmluData(dev={BIOLOGY: (short,)}, test={BIOLOGY: (short,)})
    with pytest.raises(InputError, match="at most 2 words"):
        subset_mmlu(data, questions=5, seed=0, max_words=2)


def test_training_texts_end_in_a_space_and_the_letter():
    texts = training_texts(some({"a": 2}), shots=1)
    assert [text.answer for text in texts] == [" B", " B"]
    assert texts[0].prompt.count("Answer:") == 2
    assert texts[0].prompt.endswith("Answer:")


@needs_data
def test_the_published_files_give_all_questions_and_two_spaces():
    data = load_mmlu(DATA / "mmlu")
    questions = data.questions
    assert (len(data.test), len(questions)) == (57, 14042)
    for subject in data.test:
        prompt = mmlu_prompt(subject=subject, question=data.test[subject][0], dev=data.dev[subject], shots=5)
        head = prompt.split("\n\n")[0]
        assert head.startswith("The following are multiple choice questions (with answers) about  ")
        assert "about   " not in head
        assert head.endswith(".")
        assert "_" not in head


@needs_data
def test_ten_published_questions_have_a_choice_that_pandas_reads_as_nan():
    data = load_mmlu(DATA / "mmlu")
    changed = [(a, b) for a, b in zip(data.questions, as_pandas_reads(data).questions, strict=True) if a != b]
    assert len(changed) == 10
    assert all("None" in a.choices and "nan" in b.choices for a, b in changed)
