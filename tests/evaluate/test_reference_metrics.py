"""Responses against references: the files that contain them, exact match, ROUGE, BLEU."""

import json
import sys

import pytest

from gptsmith.evaluate import reference_metrics
from gptsmith.evaluate.reference_metrics import Entry, read_responses, score


def entries(*pairs: tuple[str, str]) -> list[Entry]:
    return [Entry(str(n), "?", reference, answer) for n, (reference, answer) in enumerate(pairs)]


def write(path, rows):
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


# --- scores --------------------------------------------------------------------------------------


def test_scores_computed_by_hand():
    result = score(entries(("the cat sat", " the cat sat\n"), ("the cat sat", "the cat")))
    assert result.metrics["exact_match"] == 0.5  # white space at the ends does not count
    assert [item["exact_match"] for item in result.items] == [1.0, 0.0]
    # the second response: precision 1, recall 2/3 of the words and 1/2 of the bigrams
    second = result.items[1]
    assert second["rouge1"] == second["rougeL"] == pytest.approx(0.8)
    assert second["rouge2"] == pytest.approx(2 / 3)
    assert result.metrics["rouge1"] == pytest.approx(0.9)
    assert result.stderr["rouge1"] == pytest.approx(0.1)
    assert "bleu" not in result.stderr
    assert result.details["bleu_signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|")
    json.dumps(result.fields() | {"items": result.items}, allow_nan=False)


def test_bleu_is_computed_over_the_corpus():
    # all n-gram precisions are 1, with 10 words for 11: only the brevity penalty remains
    pairs = [("a b c d e f", "a b c d e f"), ("g h i j k", "g h i j")]
    assert score(entries(*pairs)).metrics["bleu"] == pytest.approx(
        90.4837, abs=1e-3
    )  # exp(1-11/10)


def test_references_without_latin_letters_get_a_note():
    result = score(entries(("привет", "привет"), ("hello", "hello")))
    assert result.metrics["exact_match"] == 1
    assert result.metrics["rouge1"] == 0.5
    assert "1 references have none" in result.notes[0]


def test_exact_match_needs_no_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    result = score(entries(("a", "a"), ("a", "b")))
    assert dict(result.metrics) == {"exact_match": 0.5}
    assert "gptsmith[eval]" in result.notes[0]


# --- files ---------------------------------------------------------------------------------------


def test_reads_the_file_of_instruction_tuning(tmp_path):
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "response": "4", "stopped": True}
    write(tmp_path / "responses.json", [row, row | {"input": "", "response": ""}])
    for name in ("config.yaml", "model.json"):
        (tmp_path / name).write_text("{}")
    found = [Entry("1", "Add.\n\n1 2", "3", "4"), Entry("2", "Add.", "3", "")]
    assert read_responses(tmp_path) == found
    assert read_responses(tmp_path / "responses.json") == found


def test_run_without_responses_names_the_command_that_writes_them(tmp_path):
    for name in ("config.yaml", "model.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(FileNotFoundError, match="finetune instruct"):
        read_responses(tmp_path)


def test_other_column_names(tmp_path):
    lines = tmp_path / "rows.jsonl"
    lines.write_text('{"id": 7, "prompt": "Q", "target": "T", "prediction": "P"}\n')
    assert read_responses(lines) == [Entry("7", "Q", "T", "P")]
    lines.write_text('{"answer": "T", "response": "P"}\n\n{"answer": "T", "response": "Q"}\n')
    assert read_responses(lines) == [Entry("1", "", "T", "P"), Entry("2", "", "T", "Q")]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no responses in it"),
        ([{"output": "a"}], "row 1: no column for the model's response.*'output'"),
        ([{"response": "a"}], "row 1: no column for the reference"),
        (
            [{"output": "a", "response": "b"}, {"output": "a"}],
            "row 2: no column 'response'; it has 'output'",
        ),
        ([{"output": "a", "response": None}], "row 1: 'response' is None, not text"),
        ([{"output": " ", "response": "a"}], "row 1: the reference 'output' is blank"),
        ([{"output": "a", "response": "\ud800"}], "row 1: 'response' is not Unicode"),
        ([1], "row 1: a row must be a JSON object"),
    ],
)
def test_bad_files_are_rejected_with_their_place(tmp_path, rows, message):
    path = write(tmp_path / "rows.json", rows)
    with pytest.raises(ValueError, match=message) as caught:
        read_responses(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 300


def test_every_rouge_metric_is_reported():
    assert set(reference_metrics.ROUGE) < set(score(entries(("a", "a"))).metrics)
