"""Data that cannot be used, each with its message."""

from __future__ import annotations

from tests.helpers.bad_commands import LONG, Case, also, run, validate, with_mia, with_mmlu, with_splits
from tests.helpers.bad_input import QUESTIONS, rows

F = [row["id"] for row in rows("f")]
MEMBER = {"id": "m", "document": "the river and the town and the baker"}

DATA = [
    Case(
        "missing forget file",
        lambda p: validate(p, forget=None),
        ("no forget.jsonl", "lume", "found: retain.jsonl", "fix: put the rows into forget.jsonl"),
    ),
    Case("missing folder", lambda p: validate(p, "data.path=lme"), ("path not found", "lme", "did you mean 'lume'?")),
    Case(
        "a file for the folder",
        lambda p: validate(p, "data.path=lume/forget.jsonl"),
        ("a file where a folder with both sets is expected", "data.forget"),
    ),
    Case(
        "wrong column",
        lambda p: validate(p, forget=[{"id": "1sc1", "input": "a", "outputs": "b", "task": "T"}]),
        ("no column 'output'", "nearest name is 'outputs'", "'id', 'input', 'outputs', 'task'", "data.columns.output=outputs"),
    ),
    Case("empty set", lambda p: validate(p, retain=""), ("the retain set is empty", "retain.jsonl", "fix: give at least one row")),
    Case("only white space", lambda p: validate(p, forget=" \n\n\t\n"), ("the forget set is empty", "forget.jsonl")),
    Case(
        "an id in both sets",
        lambda p: validate(p, retain=[*rows("r"), rows("f")[3]]),
        ("the id 'f1qa0' lies in the forget set and in the retain set", "fix: drop it"),
    ),
    Case(
        "an id twice",
        lambda p: validate(p, forget=p.edited(4, id="f0sc1")),
        ("the id 'f0sc1' occurs twice: in line 1 and in line 5", "forget.jsonl", "its own id"),
    ),
    Case(
        "an empty answer",
        lambda p: validate(p, forget=p.edited(2, output="")),
        ("the output is empty", "forget.jsonl, line 3, field 'output'", "fix: fill it or drop the row"),
    ),
    Case(
        "a blank question",
        lambda p: validate(p, retain=[*rows("r"), {"id": "q", "input": " \n", "output": "x", "task": "T"}]),
        ("the input holds only white space", "retain.jsonl, line 11, field 'input'"),
    ),
    Case(
        "a number for the answer",
        lambda p: validate(p, forget=p.edited(0, output=42)),
        ("the output is not a text but a number: 42", "line 1, field 'output'", "in quotes"),
    ),
    Case("null for the answer", lambda p: validate(p, forget=p.edited(0, output=None)), ("the output is not a text but null", "line 1")),
    Case(
        "a field missing in one row",
        lambda p: validate(p, forget=[*rows("f"), {"id": "z", "input": "a", "task": "T"}]),
        ("the row has no 'output', but other rows do", "line 11"),
    ),
    Case("half a character", lambda p: validate(p, forget=p.edited(5, output="a\ud800")), ("half a character", "line 6, field 'output'")),
    Case(
        "not UTF-8",
        lambda p: validate(p, forget=b'{"id": "1", "input": "a",\n "output": "\xe9"}'),
        ("not UTF-8: byte 0xe9", "line 2, byte offset 38", "save the file as UTF-8"),
    ),
    Case(
        "not JSON",
        lambda p: validate(p, forget='{"id": "a", "input": "b", "output": "c", "task": "T"}\n{"id": \n'),
        ("not valid JSON", "forget.jsonl, line 2", "one complete JSON object per line"),
    ),
    Case("a JSON array", lambda p: validate(p, forget="[{}]"), ("a JSON array", "write one object per line")),
    Case("a row that is a list", lambda p: validate(p, retain='["a"]\n'), ("a JSON array", "retain.jsonl")),
    Case("a row that is a text", lambda p: validate(p, retain='"a"\n'), ("not an object but a text", "retain.jsonl, line 1")),
    Case(
        "a broken Parquet file",
        lambda p: also(p.write("f.parquet", b"PAR1 no"), run(p, "validate", data={"forget": "f.parquet", "retain": "lume/retain.jsonl"})),
        ("not a readable Parquet file", "f.parquet", "fix:"),
    ),
    Case(
        "a torn CSV row",
        lambda p: also(
            p.write("f.csv", "id,input,output,task\na,b\n"), run(p, "validate", data={"forget": "f.csv", "retain": "lume/retain.jsonl"})
        ),
        ("the row has 2 cells, but the header has 4", "f.csv, line 2"),
    ),
    Case(
        "a row longer than the context",
        lambda p: validate(p, forget=p.edited(3, input=LONG)),
        ("the row has", "the longest allowed is 128", "row 'f1qa0'", "fix: split the row"),
    ),
    Case(
        "a long row stops a sweep",
        lambda p: also(p.lume(retain=[{**rows("r")[0], "output": LONG}, *rows("r")[1:]]), ["sweep", p.config()]),
        ("the longest allowed is 128", "row 'r0sc1'"),
    ),
    Case(
        "a long row stops a target to be built",
        lambda p: also(
            p.lume(forget=p.edited(0, input=LONG)), ["sweep", p.config(model=None, target={"tiny": {"max_position_embeddings": 64}})]
        ),
        ("the longest allowed is 64", "row 'f0sc1'"),
    ),
    Case(
        "a long row stops memorize",
        lambda p: also(p.lume(forget=p.edited(0, input=LONG)), ["memorize", p.config(target={"tiny": {"max_position_embeddings": 64}})]),
        ("the longest allowed is 64", "row 'f0sc1'"),
    ),
    Case(
        "rows longer than max_length",
        lambda p: run(p, "train", "train.max_length=8"),
        ("the longest allowed is 8", "row 'f", "train.max_length"),
    ),
    Case(
        "rows longer than a searched max_length",
        lambda p: run(p, "sweep", "train.max_length={values: [128, 8]}"),
        ("the longest allowed is 8", "row 'f"),
    ),
    Case(
        "too few documents for the folds",
        lambda p: validate(p, forget=rows("f", count=2)),
        ("Task1 has 2 documents, too few for 3 folds", "the forget set", "lume", "fix: add documents"),
    ),
    Case(
        "ids that do not say what is asked",
        lambda p: validate(p, forget=[row | {"id": f"doc-{number}"} for number, row in enumerate(rows("f"))]),
        ("no row can be scored", "lume, the validation fold of the forget set", "sc and a digit", "fix: write for instance 'doc-"),
    ),
    Case("too few documents kept", lambda p: validate(p, "data.documents=2"), ("too few for 3 folds", "fix:")),
    Case(
        "nothing to rehearse",
        lambda p: validate(p, "data.rehearse=[train]", "data.folds={train: 0, validation: 0.5, test: 0.5}"),
        ("no retain row is left to train on", "data.rehearse", "fix:"),
    ),
    Case(
        "splits: unknown id",
        lambda p: with_splits(p, train=F[:2], validation=F[2:6], test=[*F[6:], "nobody"]),
        ("lists the id 'nobody', which is not in the data", "splits.json", "fix:"),
    ),
    Case(
        "splits: an id in two folds",
        lambda p: with_splits(p, train=F[:2], validation=F[:6], test=F[6:]),
        ("the id 'f0sc1' is listed twice: in 'train' and in 'validation'", "splits.json"),
    ),
    Case(
        "splits: an id twice in a fold",
        lambda p: with_splits(p, train=[F[0], F[0], F[1]], validation=F[2:6], test=F[6:]),
        ("the id 'f0sc1' is listed twice", "list it once"),
    ),
    Case(
        "splits: a document cut",
        lambda p: with_splits(p, train=F[:1], validation=F[1:6], test=F[6:]),
        ("the document 'f0' lies in two folds", "splits.json", "in one fold"),
    ),
    Case(
        "splits: a row left out",
        lambda p: with_splits(p, train=F[:2], validation=F[2:6], test=F[8:]),
        ("leaves the row 'f3sc1' in no fold (2 such ids", "splits.json"),
    ),
    Case("splits: unknown fold", lambda p: with_splits(p, trian=F), ("unknown fold 'trian'", "did you mean 'train'?")),
    Case(
        "splits: an empty fold",
        lambda p: with_splits(p, train=F[:6], validation=[], test=F[6:]),
        ("the validation fold of the forget set is empty", "splits.json", "fix:"),
    ),
    Case("splits: no JSON", lambda p: also(p.write("lume/splits.json", "{"), validate(p)), ("not a JSON file", "splits.json", "fix:")),
]

BENCHMARKS = [
    Case("no membership folder", lambda p: validate(p, "data.mia=mai"), ("folder not found", "mai", "member.jsonl and nonmember.jsonl")),
    Case("no member.jsonl", lambda p: with_mia(p, member=None), ("no member.jsonl", "found: nonmember.jsonl", "fix:")),
    Case(
        "a member among the strangers",
        lambda p: with_mia(p, member=[MEMBER], nonmember=[{"id": "n", "document": "the river and  the town and the baker"}]),
        ("the non-member 'n' has the same text as the member 'm'", "mia", "fix: drop it"),
    ),
    Case(
        "an empty document",
        lambda p: with_mia(p, member=[MEMBER, {"id": "e", "document": ""}]),
        ("the document is empty", "member.jsonl, line 2"),
    ),
    Case(
        "a document of one token",
        lambda p: with_mia(p, nonmember=[{"id": "a", "document": "x y"}, {"id": "one", "document": "x"}]),
        ("'x' is a single token", "membership document 'one'", "fix:"),
    ),
    Case(
        "a document longer than the context",
        lambda p: with_mia(p, nonmember=[{"id": "a", "document": "x y"}, {"id": "long", "document": LONG}]),
        ("the model's context holds 128", "membership document 'long'"),
    ),
    Case("a single member", lambda p: with_mia(p, member=[MEMBER]), ("the membership attack has 1 members", "mia", "at least two of each")),
    Case("no dev folder", lambda p: with_mmlu(p, dev=None), ("no folder 'dev'", "mmlu", "dev/ and test/")),
    Case(
        "no solved examples for a subject",
        lambda p: also(p.write("mmlu/dev/maps_dev.csv", QUESTIONS), with_mmlu(p, dev=None)),
        ("MMLU file not found", "sums_dev.csv", "fix:"),
    ),
    Case("no questions", lambda p: also(p.write("mmlu/test/notes.txt", ""), with_mmlu(p, test=None)), ("no file named *_test.csv", "test")),
    Case(
        "a question of five columns",
        lambda p: with_mmlu(p, test=QUESTIONS + "5+1?,1,2,3,A\n"),
        ("the row has 5 columns instead of 6", "sums_test.csv, line 5", "fix: columns"),
    ),
    Case(
        "the answer E",
        lambda p: with_mmlu(p, test="5+1?,1,2,3,4,E\n"),
        ("the answer is 'E', not one of A, B, C, D", "sums_test.csv, line 1", "fix:"),
    ),
    Case(
        "a question longer than the context",
        lambda p: with_mmlu(p, test=f"{LONG},1,2,3,4,A\n{QUESTIONS}"),
        ("but at most 128 fit", "MMLU subject sums, row 1", "fix:"),
    ),
    Case(
        "no question is short enough",
        lambda p: also(
            p.mmlu(test=QUESTIONS.replace("?", " and two more things?")),
            validate(p, "data.mmlu=mmlu", "data.mmlu_questions=2", "data.mmlu_max_words=5"),
        ),
        ("no MMLU question left", "at most 5 words", "fix:"),
    ),
]
