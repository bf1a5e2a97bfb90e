import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import chats
import pyarrow as pa
import pytest
from data_sets import complete_data

from gptsmith.data.classification import LabelledSet, load_labelled, sort_labels
from gptsmith.data.labelled import LabelledText
from gptsmith.data.options import LabelledConfig

WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "gorse", "heron")


def pairs(n: int = 40, labels: tuple[str, ...] = ("no", "yes")) -> list[tuple[str, str]]:
    """Different texts with alternating labels."""
    return [(f"{WORDS[i % 8]} {WORDS[i // 8 % 8]} {i}", labels[i % len(labels)]) for i in range(n)]


def as_csv(path: Path, header: list[str] | None, rows: list[tuple[Any, ...]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        delimiter = "\t" if path.suffix == ".tsv" else ","
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([header] if header else [])
        writer.writerows(rows)
    return path


def load(path: Path, **options: Any) -> LabelledSet:
    return load_labelled(LabelledConfig(data=path, **options))


@pytest.mark.parametrize(
    ("labels", "marked"),
    [
        (("0", "1", "2", "-1"), "-1"),
        (("0", "1", "-100"), "-100"),
        (("0.0", "1.0", "-1.0"), "-1"),
        (("-1", "1"), ""),
        (("-2", "-1", "0", "1"), ""),
        (("-1", "none", "0", "1"), ""),
    ],
)
def test_label_that_often_marks_texts_without_a_label_is_mentioned(tmp_path, labels, marked):
    data = load(as_csv(tmp_path / "a.csv", ["text", "label"], pairs(labels=labels)))
    assert len(data.labels) == len(labels)  # it may be one: -1, 0, 1 are against, neutral, for
    said = [note for note in data.notes if "a class of its own; if it marks texts without" in note]
    assert len(said) == bool(marked)
    assert all(f"label {marked}" in note for note in said)


def everything(data: LabelledSet) -> list[LabelledText]:
    return [*data.train, *data.val, *data.test]


def content(data: LabelledSet) -> list[tuple[str, str]]:
    return sorted((row.text, row.label) for row in everything(data))


# --- where texts and labels are found ------------------------------------------------------------


def write(kind: str, folder: Path) -> Path:
    rows = pairs()
    records = [{"text": text, "label": label} for text, label in rows]
    path = folder / f"rows.{kind}"
    match kind:
        case "csv" | "tsv":
            as_csv(path, ["text", "label"], rows)
        case "json" | "jsonl" | "jsonl.gz" | "parquet":
            chats.write(path, *records)
        case "arrow":
            with pa.ipc.new_file(path, pa.Table.from_pylist(records).schema) as sink:
                sink.write(pa.Table.from_pylist(records))
        case "label_first.tsv":
            as_csv(path, None, [(label, text) for text, label in rows])
        case "text_first.csv":
            as_csv(path, None, rows)
        case "lines":
            path.write_text("".join(f"{label}\t{text}\n" for text, label in rows))
        case "lines_crlf":
            path.write_bytes(b"".join(f"{text}\t{label}\r\n".encode() for text, label in rows))
        case "fasttext":
            path.write_text("".join(f"__label__{label} {text}\n" for text, label in rows))
        case "folder":
            for i, (text, label) in enumerate(rows):
                file = path / label / f"{i:03}.txt"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(f"\n{text}\n")
    return path


@pytest.mark.parametrize(
    "kind",
    [
        "csv", "tsv", "json", "jsonl", "jsonl.gz", "parquet", "arrow", "label_first.tsv",
        "text_first.csv", "lines", "lines_crlf", "folder",
    ],
)  # fmt: skip
def test_every_form_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    data = load(write(kind, tmp_path))
    assert data.labels == ("no", "yes")
    assert content(data) == sorted(pairs())
    assert [len(part) for part in (data.train, data.val, data.test)] == [32, 4, 4]
    place = next(row.place for row in everything(data) if row.text == pairs()[2][0])
    expected = {
        "json": ", row 3", "parquet": ", row 3", "arrow": ", row 3", "folder": "002.txt",
        "csv": ":4", "tsv": ":4",
    }.get(kind, ":3")  # fmt: skip
    assert place.endswith(expected)


def test_labels_of_fasttext_and_numbered_lines(tmp_path: Path) -> None:
    assert load(write("fasttext", tmp_path)).labels == ("__label__no", "__label__yes")
    path = tmp_path / "numbered.train"
    path.write_text("".join(f"{i % 3} {text}\n" for i, (text, _) in enumerate(pairs())))
    assert load(path).labels == ("0", "1", "2")


@pytest.mark.parametrize(
    ("header", "options"),
    [
        (["sentence", "label"], {}),
        (["review", "sentiment"], {}),
        (["v2", "v1"], {}),
        (["Text", "Category"], {}),
        (["tweet", "class"], {}),  # of two, the other one
        (["message", "kind"], {}),
        (["a", "b"], {"text_column": "a", "label_column": "b"}),
        (["review", "text"], {"text_column": "review", "label_column": "text"}),
    ],
)
def test_columns_are_found_when_obvious(
    tmp_path: Path, header: list[str], options: dict[str, str]
) -> None:
    data = load(as_csv(tmp_path / "rows.csv", header, pairs()), **options)
    assert content(data) == sorted(pairs())


def test_text_and_label_win_over_other_known_names(tmp_path: Path) -> None:
    rows = [("t", text, i, label) for i, (text, label) in enumerate(pairs())]
    path = as_csv(tmp_path / "rows.csv", ["review", "text", "class", "label"], rows)
    assert content(load(path)) == sorted(pairs())


def test_labels_are_text_whatever_their_type(tmp_path: Path) -> None:
    def labels(values: list[Any]) -> tuple[str, ...]:
        rows = [{"text": t, "label": values[i % len(values)]} for i, (t, _) in enumerate(pairs())]
        return load(chats.write(tmp_path / "rows.jsonl", *rows)).labels

    assert labels([1, 10, 9]) == ("1", "9", "10")
    assert labels([1.0, 0.0]) == ("0", "1")  # pandas makes such of integers with gaps
    assert labels([0.5, 1.5]) == ("0.5", "1.5")
    assert labels([True, False]) == ("false", "true")
    assert labels(["b ", " a"]) == ("a", "b")


def test_exports_of_annotation_tools(tmp_path: Path) -> None:
    rows = [{"id": i, "text": text, "label": [label]} for i, (text, label) in enumerate(pairs())]
    doccano = load(chats.write(tmp_path / "a.jsonl", *rows))
    assert {(row.text, row.label) for row in everything(doccano)} == {*pairs()}
    path = chats.write(tmp_path / "b.jsonl", *rows, rows[0] | {"label": ["no", "yes"]})
    with pytest.raises(ValueError, match=r"b\.jsonl:41: several labels: a text has one here"):
        load(path)
    answers = ["accept"] * 4 + ["reject", "ignore"]  # Prodigy: reject is not this label
    rows = [row | {"answer": answers[i % 6], "_input_hash": i} for i, row in enumerate(rows)]
    data = load(chats.write(tmp_path / "c.jsonl", *rows))
    assert len(everything(data)) == 28
    assert any("rejected or ignored by the annotator: 12 (" in note for note in data.notes)


def test_labels_are_sorted_as_numbers_only_if_all_are() -> None:
    assert sort_labels(["10", "-2", "9.5"]) == ("-2", "9.5", "10")
    assert sort_labels(["10", "9", "nan"]) == ("10", "9", "nan")
    assert sort_labels(["b", "a", "B"]) == ("B", "a", "b")


@pytest.mark.parametrize(
    ("form", "labels"),
    [
        ("{label}\t{text}", ("a", "b")),
        ("{text}\t{label}", ("a", "b")),
        ("{label} {text}", ("-1", "+1")),
        ("{label} {text}", ("neg", "pos")),
        ("{label} {text}", ("DESC:manner", "HUM:ind", "NUM:date")),
        ("{label} {text}", ("__label__x", "__label__y")),
        ("{label}: {text}", ("neg", "pos")),
        ("{label},{text}", ("neg", "pos")),
        ("{text},{label}", ("neg", "pos")),
        ("{text};{label}", ("0", "1")),
        ("{label} ||| {text}", ("neg", "pos")),
        ("{text} {label}", ("1", "2", "3", "4", "5")),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "utf-16"])
def test_label_forms_of_lines(
    tmp_path: Path, form: str, labels: tuple[str, ...], encoding: str
) -> None:
    rows = [(f"{text}, señor | yes", label) for text, label in pairs(60, labels)]
    path = tmp_path / "rows.label"
    lines = "".join(form.format(text=text, label=label) + "\n" for text, label in rows)
    path.write_text(lines, encoding=encoding)
    data = load(path)
    assert set(data.labels) == set(labels)
    assert content(data) == sorted(rows)
    said = " ".join(data.notes)
    assert ("read as" in said) == (encoding != "utf-8")
    assert ("the label is the part" in said) == ("\t" not in form)


@pytest.mark.parametrize(
    ("form", "labels"),
    [
        ("{label} {text} {end}", ("DESC:manner", "HUM:ind", "NUM:date")),  # as in TREC
        ("{label} {text} {end}", ("neg", "pos")),
        ("{label} {text} {end}", ("__label__x", "__label__y")),
        ("{text},{label}", ("not spam", "spam")),
        ("{text},{label}", ("New York", "Paris")),
        ("{label}: {text}", ("not spam", "spam")),
        ("{label}; {text}", ("so so", "not at all")),
        ('"{text}",{label}', ("neg", "pos")),  # as in a .csv
        ('"{label}","{text}"', ("neg", "pos")),
    ],
)
def test_labels_are_told_from_punctuation_and_parts_of_labels(
    tmp_path: Path, form: str, labels: tuple[str, ...]
) -> None:
    rows = [(text, label, "?."[i % 2]) for i, (text, label) in enumerate(pairs(60, labels))]
    path = tmp_path / "rows.txt"
    lines = (form.format(text=text, label=label, end=end) for text, label, end in rows)
    path.write_text("\n".join(lines))
    ended = "{end}" in form
    assert content(load(path)) == sorted((f"{t} {e}" if ended else t, x) for t, x, e in rows)


@pytest.mark.parametrize("header", ["sentence\tlabel", "label\ttext", "text,label", "v1;v2"])
def test_a_header_line_of_a_text_file_names_its_columns(tmp_path: Path, header: str) -> None:
    delimiter = next(d for d in "\t,;" if d in header)
    label_first = header.startswith(("label", "v1"))
    rows = [f'"{t}"{delimiter}{x}' if not label_first else f"{x}{delimiter}{t}" for t, x in pairs()]
    (tmp_path / "rows.txt").write_text("\n".join([header, *rows]))
    assert content(load(tmp_path / "rows.txt")) == sorted(pairs())


def test_json_under_another_name_is_a_table(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_text("".join(json.dumps({"text": t, "label": x}) + "\n" for t, x in pairs()))
    assert content(load(path)) == sorted(pairs())


def test_a_line_of_several_labels_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    lines = [f"__label__{x} {text}\n" for text, x in pairs()]
    path.write_text("".join([*lines, "__label__pos __label__neg both\n"]))
    with pytest.raises(ValueError, match=r"rows\.txt:41: several labels"):
        load(path)


def test_few_lines_of_another_form_are_named(tmp_path: Path) -> None:
    rows = [f"{label} {text}\n" for text, label in pairs(60)]
    (tmp_path / "rows.txt").write_text("".join([*rows, "alone\n"]))
    with pytest.raises(ValueError, match=r"rows\.txt:61: the text is missing"):
        load(tmp_path / "rows.txt")
    assert len(everything(load(tmp_path / "rows.txt", on_error="skip"))) == 60


def test_a_delimiter_may_be_given(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    rows = [(f"{i} {text}", label) for i, (text, label) in enumerate(pairs())]
    path.write_text("".join(f"{text}~{label}\n" for text, label in rows))
    with pytest.raises(ValueError, match="which part of a line is the label"):
        load(path)
    assert content(load(path, delimiter="~")) == sorted(rows)


def test_several_files_are_one_set(tmp_path: Path) -> None:
    rows = pairs(80)
    first = as_csv(tmp_path / "a.csv", ["text", "label"], rows[:40])
    second = tmp_path / "b.txt"
    second.write_text("".join(f"{label}\t{text}\n" for text, label in rows[40:]))
    data = load_labelled(LabelledConfig(data=(first, second)))
    assert content(data) == sorted(rows)


# --- what is rejected -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "options", "message"),
    [
        (["a", "b"], {}, "which column holds the text? Choose from 'a', 'b' with --text-column"),
        (["review", "x", "label"], {"text_column": "nope"}, "no column 'nope', only 'review'"),
        (["review", "sms", "label"], {}, "the text? Choose from 'review', 'sms'"),
        (["text", "x", "y"], {}, "which column holds the label? Choose from 'text', 'x', 'y'"),
        (["sentence", "index"], {}, "which column holds the label?"),  # all different: no labels
        (["text", "label"], {"label_column": "text"}, "cannot be text and label at once"),
    ],
)
def test_unclear_columns_are_an_error(
    tmp_path: Path, header: list[str], options: dict[str, str], message: str
) -> None:
    rows = [(text, i, label)[: len(header)] for i, (text, label) in enumerate(pairs())]
    with pytest.raises(ValueError) as caught:
        load(as_csv(tmp_path / "rows.csv", header, rows), **options)
    assert message in str(caught.value)
    assert f"{tmp_path / 'rows.csv'}:2" in str(caught.value)


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        ({"text": "a heron", "label": None}, "the label is missing"),
        ({"text": "a heron"}, "the label is missing"),
        ({"text": "a heron", "label": ""}, "the label is missing"),
        ({"text": "a heron", "label": ["x", "y"]}, "several labels"),
        ({"text": "a heron", "label": float("nan")}, "the label is missing"),
        ({"text": None, "label": "no"}, "the text is missing"),
        ({"text": " \n", "label": "no"}, "the text is missing"),
        ({"text": {"a": 7}, "label": "no"}, "the text holds a struct, not text"),
        ({"text": "\ud800", "label": "no"}, "not UTF-8"),
    ],
)
def test_bad_rows_are_an_error_or_skipped(tmp_path: Path, bad: dict[str, Any], what: str) -> None:
    records: list[dict[str, Any]] = [{"text": text, "label": label} for text, label in pairs()]
    records[5:5] = [bad]
    path = chats.write(tmp_path / "rows.jsonl", *records)
    with pytest.raises(ValueError, match=f"rows.jsonl:6: {what}.*; --on-error skip"):
        load(path)
    data = load(path, on_error="skip")
    assert content(data) == sorted(pairs())
    kind = "cell that is not text" if "holds" in what else what
    assert f"skipped, {kind}: 1 ({path}:6)" in data.notes


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    path = write("folder", tmp_path)
    (path / "no" / "000.txt").write_bytes(b"caf\xff")
    with pytest.raises(ValueError, match=r"no/000\.txt: not UTF-8"):
        load(path)
    assert len(everything(load(path, on_error="skip"))) == len(pairs()) - 1


def test_a_line_without_label(tmp_path: Path) -> None:
    path = write("lines", tmp_path)
    path.write_text(path.read_text() + "just a text\n")
    with pytest.raises(ValueError, match=":41: the text is missing"):
        load(path)


@pytest.mark.parametrize("text", ["", "\n\n", "Call me\nIshmael\n", "one two\nthree four\n"])
def test_text_without_labels_is_rejected(tmp_path: Path, text: str) -> None:
    path = tmp_path / "novel.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match="which part of a line is the label"):
        load(path)


def test_unusable_sets_are_rejected(tmp_path: Path) -> None:
    path = as_csv(tmp_path / "rows.csv", ["text", "label"], pairs())
    same = as_csv(tmp_path / "same.csv", ["text", "label"], [(t, "x") for t, _ in pairs()])
    with pytest.raises(ValueError, match="all texts are labelled 'x'"):
        load(same)
    with pytest.raises(ValueError, match=r"same\.csv:2: label 'x' is not in .*rows\.csv"):
        load(path, test=same)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "missing.csv")
    with pytest.raises(ValueError, match="leave nothing to train"):
        LabelledConfig(data=path, val_fraction=0.5, test_fraction=0.5)
    header_only = as_csv(tmp_path / "empty.csv", ["text", "label"], [])
    with pytest.raises(ValueError, match="no row with a text and a label"):
        load(header_only)


# --- the split -----------------------------------------------------------------------------------


def test_each_split_has_its_share_of_each_label(tmp_path: Path) -> None:
    labels = ("a",) * 6 + ("b",) * 3 + ("c",)
    path = as_csv(tmp_path / "rows.csv", ["text", "label"], pairs(500, labels))
    data = load(path, val_fraction=0.1, test_fraction=0.2)
    counts = [Counter(row.label for row in part) for part in (data.train, data.val, data.test)]
    assert counts == [
        {"a": 210, "b": 105, "c": 35}, {"a": 30, "b": 15, "c": 5}, {"a": 60, "b": 30, "c": 10},
    ]  # fmt: skip
    assert content(data) == sorted(pairs(500, labels))


def test_the_split_depends_on_the_seed_alone(tmp_path: Path) -> None:
    path = as_csv(tmp_path / "rows.csv", ["text", "label"], pairs(200))
    one, again, other = load(path), load(path), load(path, split_seed=1)
    assert one == again
    assert one.fingerprint == again.fingerprint != other.fingerprint
    assert {row.text for row in one.test} != {row.text for row in other.test}


def test_fingerprint_depends_on_every_text(tmp_path: Path) -> None:
    path = as_csv(tmp_path / "rows.csv", ["text", "label"], pairs(200))
    before = load(path).fingerprint
    path.write_text(path.read_text().replace("amber amber 0,", "amber amber 0!,"))
    assert load(path).fingerprint != before


def test_copies_of_a_text_stay_in_one_split(tmp_path: Path) -> None:
    rows = pairs(60)
    copies = [(f"  {text.replace(' ', '  ')} ", label) for text, label in rows[:50]]
    path = as_csv(tmp_path / "rows.csv", ["text", "label"], rows + copies + rows[:10])
    data = load(path)
    where: dict[str, set[str]] = {}
    for name in ("train", "val", "test"):
        for row in getattr(data, name):
            where.setdefault(" ".join(row.text.split()), set()).add(name)
    assert all(len(names) == 1 for names in where.values())
    assert [len(data.val), len(data.test)] == [12, 12]  # the shares count copies too
    assert "60 of 120 texts repeat another one: copies share a split" in data.notes
    unique = load(path, deduplicate=True)
    assert content(unique) == sorted(rows)
    assert "60 repeated texts dropped" in unique.notes


def test_texts_of_a_test_file_are_not_trained_on(tmp_path: Path) -> None:
    path = as_csv(tmp_path / "rows.csv", ["text", "label"], pairs(60))
    test = as_csv(tmp_path / "test.csv", ["text", "label"], [*pairs(10), ("new", "yes")])
    val = as_csv(tmp_path / "val.csv", ["text", "label"], pairs(20)[8:])
    data = load(path, test=test, val=val)
    assert len(data.test) == 11
    assert len(data.val) == 12 - 2
    assert len(data.train) == 60 - 20
    assert "20 training texts dropped, because they are in validation or test too" in data.notes
    assert "2 validation texts dropped, because they are in the test too" in data.notes


def test_contradicting_labels_are_noted(tmp_path: Path) -> None:
    rows = [*pairs(), (pairs()[0][0], "yes")]
    data = load(as_csv(tmp_path / "rows.csv", ["text", "label"], rows))
    assert "1 texts occur with different labels" in data.notes


def test_balancing_changes_the_training_split_only(tmp_path: Path) -> None:
    labels = ("a",) * 8 + ("b",) * 2
    path = as_csv(tmp_path / "rows.csv", ["text", "label"], pairs(200, labels))
    plain, data = load(path), load(path, balance=True)
    assert Counter(row.label for row in data.train) == {"a": 32, "b": 32}
    assert (data.val, data.test) == (plain.val, plain.test)
    assert set(data.train) < set(plain.train)
    assert "balanced: 32 training texts of each label, 160 before" in data.notes


def test_rare_labels(tmp_path: Path) -> None:
    def split(*rare: int) -> LabelledSet:
        rows = pairs(40) + [(f"rare {n} {i}", f"r{n}") for n in rare for i in range(n)]
        return load(as_csv(tmp_path / "rows.csv", ["text", "label"], rows))

    data = split(3)  # one text for each split
    assert all("r3" in {row.label for row in part} for part in (data.train, data.val, data.test))
    data = split(1, 2)
    assert {"r1", "r2"} <= {row.label for row in data.train}
    assert {"r2"} <= {row.label for row in data.test}
    assert "label 'r1' has 1 texts: too few for every split" in data.notes


@pytest.mark.parametrize(
    ("rows", "repeated", "test"),
    [(60, 8, {"ham": 5, "spam": 1}), (5574, 414, {"ham": 483, "spam": 75})],
)
def test_sms_spam(rows: int, repeated: int, test: dict[str, int], real_data: Path) -> None:
    name, size = "sms_spam/SMSSpamCollection", 477_907
    sms = load((real_data if rows == 60 else complete_data({name: size})) / name)
    assert sms.labels == ("ham", "spam")
    assert len(everything(sms)) == rows
    assert Counter(row.label for row in sms.test) == test
    assert f"{repeated} of {rows:,} texts repeat another one: copies share a split" in sms.notes


def test_sst2() -> None:
    sizes = {
        "sst2_sentences/stsa.binary.train": 738_844,
        "sst2_sentences/stsa.binary.dev": 94_400,
        "sst2_sentences/stsa.binary.test": 193_562,
        "sst2_glue/dev.tsv": 94_931,
        "sst2_glue/test.tsv": 197_335,
    }
    folder = complete_data(sizes)
    stars = folder / "sst2_sentences"
    files = {name: stars / f"stsa.binary.{name}" for name in ("train", "dev", "test")}
    sst = load(files["train"], val=files["dev"], test=files["test"])
    assert (len(sst.val), len(sst.test), sst.labels) == (872, 1821, ("0", "1"))
    glue = folder / "sst2_glue"
    assert len(load(glue / "dev.tsv").train) == 698
    with pytest.raises(ValueError, match="which column holds the label"):  # index and sentence
        load(glue / "test.tsv")
