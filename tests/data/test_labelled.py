"""Labelled texts in every form of file; what is not obvious or not labelled is rejected."""

import json
from pathlib import Path
from typing import Any

import pytest
import tables
from labelled_texts import as_csv, content, everything, load, pairs

from gptsmith.data.classification import load_labelled
from gptsmith.data.options import LabelledConfig


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


# --- where texts and labels are found ------------------------------------------------------------


def write(kind: str, folder: Path) -> Path:
    rows = pairs()
    records = [{"text": text, "label": label} for text, label in rows]
    path = folder / f"rows.{kind}"
    match kind:
        case "csv" | "tsv":
            as_csv(path, ["text", "label"], rows)
        case "json" | "jsonl" | "jsonl.gz" | "parquet" | "arrow":
            tables.write(path, *records)
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
        return load(tables.write(tmp_path / "rows.jsonl", *rows)).labels

    assert labels([1, 10, 9]) == ("1", "9", "10")
    assert labels([1.0, 0.0]) == ("0", "1")  # pandas makes such of integers with gaps
    assert labels([0.5, 1.5]) == ("0.5", "1.5")
    assert labels([True, False]) == ("false", "true")
    assert labels(["b ", " a"]) == ("a", "b")


def test_exports_of_annotation_tools(tmp_path: Path) -> None:
    rows = [{"id": i, "text": text, "label": [label]} for i, (text, label) in enumerate(pairs())]
    doccano = load(tables.write(tmp_path / "a.jsonl", *rows))
    assert {(row.text, row.label) for row in everything(doccano)} == {*pairs()}
    path = tables.write(tmp_path / "b.jsonl", *rows, rows[0] | {"label": ["no", "yes"]})
    with pytest.raises(ValueError, match=r"b\.jsonl:41: several labels: a text has one here"):
        load(path)
    answers = ["accept"] * 4 + ["reject", "ignore"]  # Prodigy: reject is not this label
    rows = [row | {"answer": answers[i % 6], "_input_hash": i} for i, row in enumerate(rows)]
    data = load(tables.write(tmp_path / "c.jsonl", *rows))
    assert len(everything(data)) == 28
    assert any("rejected or ignored by the annotator: 12 (" in note for note in data.notes)


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
    path = tables.write(tmp_path / "rows.jsonl", *records)
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
