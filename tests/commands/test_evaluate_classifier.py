"""`gptsmith evaluate` of a classifier: labelled texts, two classifiers compared."""

import json
from pathlib import Path

import pytest
import torch
from runs import random_run

from gptsmith.data.classification import encode_labelled
from gptsmith.data.labelled import read_labelled
from gptsmith.data.options import LabelledFiles
from gptsmith.data.report import ReadReport
from gptsmith.evaluate.classification import log_probabilities, score
from gptsmith.model.config import ModelConfig
from gptsmith.run import Run
from gptsmith.train.runtime import choose_precision

T = 16
CONFIG = ModelConfig(n_layer=1, n_head=2, n_embd=16, context_length=T, vocab_size=257)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    config = CONFIG.change(labels=("ham", "spam"))
    return random_run(tmp_path_factory.mktemp("classifiers") / "spam", config).path


@pytest.fixture
def language_model(tmp_path) -> Path:
    return random_run(tmp_path / "text", CONFIG).path


@pytest.fixture
def messages(tmp_path) -> Path:
    rows = [("ham" if n % 3 else "spam", "call now " * (n % 4) + str(n)) for n in range(30)]
    path = tmp_path / "messages.tsv"
    path.write_text("label\ttext\n" + "".join(f"{label}\t{text}\n" for label, text in rows))
    return path


def test_classifier_on_labelled_texts(evaluate, classifier, messages, tmp_path):
    out = tmp_path / "out.json"
    code, shown, err = evaluate(classifier, "--data", messages, "--out", out)
    assert code == 0, err
    found = json.loads(out.read_text())["classify"]
    run = Run.open(classifier)
    rows = read_labelled(messages, LabelledFiles(), ReadReport())
    texts = encode_labelled(run.tokenizer, rows, ("ham", "spam"), T)
    log_p = log_probabilities(
        run.load_model(), texts.ids, choose_precision("fp32", torch.device("cpu"))
    )
    expected = score(("ham", "spam"), log_p, texts.classes).fields()
    assert found["n"] == expected.pop("texts") == 30
    assert {name: found[name] for name in expected} == expected
    low, high = found["accuracy_95"]
    assert low < found["accuracy"] < high
    for part in ("precision", "recall", "F1", "majority class: 66.67%", "95% interval"):
        assert part in shown
    assert "14 of 30 texts (47%) are truncated to 16 tokens" in err
    items = [json.loads(x) for x in (tmp_path / "out.items.jsonl").read_text().splitlines()]
    assert sum(item["accuracy"] for item in items) / 30 == pytest.approx(found["accuracy"])
    assert items[1]["id"].endswith("messages.tsv:3")
    for name in ("out.png", "out-confusion.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_texts_are_truncated_as_in_tuning(command, messages, tmp_path):
    run = random_run(tmp_path / "spam", CONFIG.change(labels=("ham", "spam"))).path
    with (run / "config.yaml").open("a") as file:
        file.write("context_length: 8\n")
    (run / "digests.json").unlink()
    code, _, measured = command("evaluate", run, "--data", messages, "--out", tmp_path / "out.json")
    assert code == 0, measured
    assert "22 of 30 texts (73%) are truncated to 8 tokens" in measured
    code, found, noted = command("classify", run, "--file", messages)
    assert code == 0, noted
    assert "22 of the texts truncated to 8 tokens" in noted
    items = (tmp_path / "out.items.jsonl").read_text()
    for pair in zip(found.splitlines(), items.splitlines(), strict=True):
        one, other = (json.loads(line)["probabilities"] for line in pair)
        assert one == pytest.approx(other, abs=1e-5)


def test_classifiers_are_compared_text_by_text(evaluate, classifier, messages, tmp_path):
    other = random_run(tmp_path / "other", CONFIG.change(labels=("ham", "spam")), seed=2).path
    out = tmp_path / "out.json"
    code, shown, err = evaluate(classifier, "--data", messages, "--compare", other, "--out", out)
    assert code == 0, err
    paired = json.loads(out.read_text())["compare"]["paired"]["classify"]
    a, b = paired["accuracy"]["spam"], paired["accuracy"]["other"]
    assert paired["accuracy"]["difference"] == pytest.approx(a - b)
    low, high = paired["accuracy"]["interval_95"]
    assert low <= a - b <= high
    assert "difference" in shown


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "is a classifier: give labelled texts with --data FILE"),
        ("--data FILE --tasks perplexity", "is a classifier, which has no task but classify"),
        ("--data OTHER", "other.csv:3: label 'eggs' is none of"),
        ("--data OTHER --label-column kind", "no column 'kind'"),
        ("--data NONE", "no row with a text and a label"),
    ],
)
def test_wrong_input_of_a_classifier_is_one_line(evaluate, classifier, messages, argv, message):
    other, none = messages.with_name("other.csv"), messages.with_name("none.csv")
    other.write_text("label,text\nham,a\neggs,b\nham,c\n")
    none.write_text("label,text\n")
    names = {"FILE": messages, "OTHER": other, "NONE": none}
    code, _, err = evaluate(classifier, *(names.get(word, word) for word in argv.split()))
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1


def test_unknown_labels_are_skipped_and_counted(evaluate, classifier, tmp_path):
    (tmp_path / "x.csv").write_text("label,text\nham,a\neggs,b\nspam,c\nham,\n")
    code, shown, err = evaluate(classifier, "--data", tmp_path / "x.csv", "--on-error", "skip")
    assert code == 0
    assert "2 texts" in shown
    assert "label that the classifier does not have: 1 (" in err
    assert "the text is missing: 1 (" in err


def test_classifier_is_not_compared_with_a_language_model(
    evaluate, classifier, language_model, messages
):
    code, _, err = evaluate(classifier, "--data", messages, "--compare", language_model)
    assert code == 2
    assert "are a classifier and a language model: no task can compare them" in err


def test_language_model_has_no_classes(evaluate, language_model, messages):
    code, _, err = evaluate(language_model, "--data", messages, "--tasks", "classify")
    assert code == 2
    assert "is a language model without classes: gptsmith finetune classify" in err
