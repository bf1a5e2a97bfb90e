"""The splits of labelled texts: shares, copies, rare labels, and sets that cannot be split."""

from collections import Counter
from pathlib import Path

import pytest
from data_sets import complete_data
from labelled_texts import as_csv, content, everything, load, pairs

from gptsmith.data.classification import LabelledSet, sort_labels
from gptsmith.data.options import LabelledConfig


def test_labels_are_sorted_as_numbers_only_if_all_are() -> None:
    assert sort_labels(["10", "-2", "9.5"]) == ("-2", "9.5", "10")
    assert sort_labels(["10", "9", "nan"]) == ("10", "9", "nan")
    assert sort_labels(["b", "a", "B"]) == ("B", "a", "b")


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
    assert "20 training texts dropped, found in validation or test too" in data.notes
    assert "2 validation texts dropped, found in the test too" in data.notes


def test_contradicting_labels_are_noted(tmp_path: Path) -> None:
    rows = [*pairs(), (pairs()[0][0], "yes")]
    data = load(as_csv(tmp_path / "rows.csv", ["text", "label"], rows))
    assert "1 text with different labels" in data.notes


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
    assert "label 'r1' has 1 text: too few for every split" in data.notes


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
