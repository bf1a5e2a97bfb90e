"""Classification from end to end: a base run and labelled rows in, a run that names classes out."""

import csv
import io
import json
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from runs import assert_same_weights, events, kill_after

from gptsmith import cli
from gptsmith.model.classifier import GPTClassifier
from gptsmith.run import Run

CONFIGS = Path(__file__).parents[2] / "configs" / "finetune"
KINDS = {"bird": ("wren", "heron"), "fish": ("trout", "perch"), "tree": ("birch", "cedar")}
ROWS = [
    (f"{'the ' * (i % 4)}{word} {i}", kind)
    for kind, words in KINDS.items()
    for word in words
    for i in range(20)
]
SMALL = [
    "--train.batch-size", "8", "--texts-per-step", "16", "--train.num-threads", "1",
    "--monitor.trackers", "none", "--optim.learning-rate", "0.01", "--optim.warmup-steps", "5",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *ROWS])
    return path


def words(base: Path, data: Path, out: Path, *more: str) -> list[str]:
    where = ["--from", str(base), "--data", str(data), "--out", str(out)]
    return ["finetune", "classify", *where, *SMALL, *more]


@pytest.fixture(scope="module")
def tuned(base, data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "kinds"
    assert cli.main(words(base, data, out, "--trained", "all", "--train.steps", "60")) == 0
    return out


def test_learns_and_reports_the_test_split(tuned, data):
    result = json.loads((tuned / "test.json").read_text())
    assert result["accuracy"] >= 0.9
    assert result["majority_accuracy"] == pytest.approx(1 / 3)
    assert (result["texts"], list(result["classes"])) == (12, ["bird", "fish", "tree"])
    first, *_, last = events(tuned, "val")
    assert (first["step"], last["step"]) == (0, 60)
    assert last["val_loss"] < first["val_loss"] / 2
    assert last["accuracy"] > first["accuracy"]
    assert last["sample_accuracy"] > 0.9

    # every test text was predicted once, and the table counts these predictions
    lines = (tuned / "test-predictions.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert len({row["text"] for row in found}) == 12
    assert {(row["text"], row["label"]) for row in found} < set(ROWS)
    hits = sum(row["predicted"] == row["label"] for row in found)
    assert hits / 12 == pytest.approx(result["accuracy"])
    for row in found:
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert row["predicted"] == max(row["probabilities"], key=row["probabilities"].get)
        line = data.read_text().splitlines()[int(row["place"].rpartition(":")[2]) - 1]
        assert line == f"{row['text']},{row['label']}"

    report = (tuned / "report.md").read_text()
    for part in ("## Test", "| bird |", "![confusion matrix](confusion.png)", "gptsmith classify"):
        assert part in report
    assert "train: 96 texts (bird 32, fish 32, tree 32)" in report
    for name in ("confusion.png", "confusion.pdf", "history.png", "history.pdf", "curves.png"):
        assert (tuned / name).stat().st_size > 1000
    assert Run.open(tuned).model_config.labels == ("bird", "fish", "tree")


def run_of(base: Path, data: Path, out: Path, *more: str) -> Run:
    argv = words(base, data, out, "--train.steps", "3", "--eval.interval", "0", *more)
    assert cli.main(argv) == 0
    return Run.open(out)


@pytest.mark.parametrize(
    ("more", "trained"),
    [
        (["--trained", "head"], ["score.weight"]),
        ([], ["score.weight", "final_norm.*", "blocks.1.*"]),
        (["--trained", "all"], ["*"]),
        (["--freeze", "blocks.*"], ["score.weight", "final_norm.*", "embedding.*"]),
        (["--lora.rank", "2"], ["score.weight", "blocks.*.qkv.*", "blocks.*.proj.*",
                                "blocks.*.gate_up.*", "blocks.*.down.*"]),
    ],
    ids=["head", "default", "all", "pattern", "lora"],
)  # fmt: skip
def test_trained_parameters(base, data, tmp_path, capsys, more, trained):
    run = run_of(base, data, tmp_path / "run", *more)
    before, after = Run.open(base).load_model().state_dict(), run.load_model().state_dict()
    assert set(after) == {*before, "score.weight"}
    for name in before:
        meant = any(fnmatchcase(name, pattern) for pattern in trained)
        assert torch.equal(before[name], after[name]) is not meant, name
    notes = [e["message"] for e in events(tmp_path / "run", "note")]
    assert any("parameters are trained" in note for note in notes)
    assert "accuracy" in capsys.readouterr().out


def test_killed_and_resumed_run_is_bit_exact(base, data, tmp_path):
    argv = words(base, data, tmp_path / "straight", "--train.steps", "40", "--lora.rank", "2")
    argv += ["--save.interval", "5", "--save.keep-last", "99", "--eval.interval", "20"]
    assert cli.main(argv) == 0
    out = tmp_path / "killed"
    argv[argv.index(str(tmp_path / "straight"))] = str(out)
    kill_after(10, argv, out)
    assert not (out / "test.json").exists()
    assert cli.main(["finetune", "classify", "--out", str(out), "--resume"]) == 0
    assert_same_weights(tmp_path / "straight", out)
    tests = [(tmp_path / n / "test-predictions.jsonl").read_text() for n in ("straight", "killed")]
    assert tests[0] == tests[1]


def test_resume_rejects_other_texts(base, data, tmp_path, capsys):
    path = tmp_path / "rows.csv"
    path.write_text(data.read_text())
    run_of(base, path, tmp_path / "run")
    path.write_text(path.read_text().replace("heron", "raven"))
    assert cli.main(["finetune", "classify", "--out", str(tmp_path / "run"), "--resume"]) == 2
    assert "fingerprint of the training data" in capsys.readouterr().err


def test_classifier_can_be_fine_tuned_to_other_classes(tuned, tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text("".join(f"{len(text) % 2}\t{text}\n" for text, _ in ROWS))
    run = run_of(tuned, path, tmp_path / "run")
    assert run.model_config.labels == ("0", "1")
    model = run.load_model()
    assert isinstance(model, GPTClassifier)
    assert model.score.weight.shape == (2, 32)


def test_long_texts_are_truncated_and_counted(base, tmp_path):
    path = tmp_path / "rows.csv"
    rows = [(f"{text} {'and so on ' * (i % 2 * 9)}", kind) for i, (text, kind) in enumerate(ROWS)]
    path.write_text("text,label\n" + "".join(f"{text},{kind}\n" for text, kind in rows))
    run_of(base, path, tmp_path / "run", "--context-length", "12")
    notes = [e["message"] for e in events(tmp_path / "run", "note")]
    cut = sum(len(text.strip()) > 12 for text, _ in rows)
    assert f"data: {cut} texts are longer than 12 tokens and were truncated" in notes


@pytest.mark.parametrize("recipe", ["sms-spam", "sentiment", "movie-reviews", "topics"])
def test_recipes(recipe, base, data, tmp_path):
    argv = words(base, data, tmp_path / "run", "--train.steps", "1", "--train.epochs", "none")
    argv.insert(2, str(CONFIGS / f"{recipe}.yaml"))
    assert cli.main([*argv, "--context-length", "32"]) == 0
    assert json.loads((tmp_path / "run" / "test.json").read_text())["texts"] == 12


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--trained", "head", "--lora.rank", "2"], "give one of the two"),
        (
            ["--texts-per-step", "12"],
            "not a multiple of train.batch_size 8: give --train.batch-size 6",
        ),
        (["--train.total-batch-tokens", "64"], "--texts-per-step"),
        (["--context-length", "65"], "more than the model's 64"),
        (["--text-column", "body"], "no column 'body', only 'text', 'label'"),
        (["--trained", "tail"], "'head', 'last-block' or 'all'"),
        (["--data", "nowhere.csv"], "nowhere.csv"),
        (["--from", "nowhere"], "there is no run folder nowhere"),
    ],
)
def test_user_errors(base, data, tmp_path, user_error, more, says):
    error = user_error(*words(base, data, tmp_path / "run", *more))
    assert says in error
    assert len(error) < 320
    assert not (tmp_path / "run").exists()


# --- gptsmith classify ---------------------------------------------------------------------------


def test_one_text_shows_every_class(tuned, capsys):
    """The probabilities are those that the test recorded."""
    recorded = json.loads((tuned / "test-predictions.jsonl").read_text().splitlines()[0])
    capsys.readouterr()
    assert cli.main(["classify", str(tuned), f" {recorded['text']}\n"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0][0] == recorded["predicted"]
    shown = {label: float(p.rstrip("%")) / 100 for label, p in lines}
    assert shown == pytest.approx(recorded["probabilities"], abs=2e-3)


def test_several_texts_show_their_most_probable_class(tuned, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the perch 3\n"))
    texts = ["the wren 5", "-", "a cedar " * 40]
    assert cli.main(["classify", str(tuned), *texts]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["bird", "fish"]
    assert lines[1].endswith("%  the perch 3")
    assert lines[2].endswith("…")
    assert "1 of the texts truncated to 64 tokens" in said.err


def test_standard_input_that_is_no_text_is_named(tuned, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"perch \xff"), "utf-8"))
    assert cli.main(["classify", str(tuned), "-"]) == 2
    assert "-: standard input is not UTF-8" in capsys.readouterr().err


def test_files_of_texts(tuned, data, tmp_path, capsys):
    out = tmp_path / "found.csv"
    assert cli.main(["classify", str(tuned), "--file", str(data), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"120 predictions in {out}\n"
    rows = list(csv.DictReader(io.StringIO(out.read_text())))
    assert [(row["text"], row["label"]) for row in rows] == ROWS
    assert list(rows[0])[2:] == ["predicted", "p(bird)", "p(fish)", "p(tree)"]
    assert sum(row["predicted"] == row["label"] for row in rows) > 100

    lines = tmp_path / "lines.txt"
    lines.write_text("the wren 5\n\nthe perch 3\n")
    assert cli.main(["classify", str(tuned), "--file", str(lines)]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in printed] == ["the wren 5", "the perch 3"]
    out = tmp_path / "found.jsonl"
    assert cli.main(["classify", str(tuned), "--file", str(lines), "--out", str(out)]) == 0
    assert [json.loads(line) for line in out.read_text().splitlines()] == printed


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["RUN"], "give either texts"),
        (["RUN", "a text", "--file", "x.csv"], "give either texts"),
        (["RUN", "a text", "--out", "x.csv"], "for the predictions of a --file"),
        (["RUN", "--file", "x.csv", "--out", "x.xlsx"], "as .csv or .jsonl"),
        (["RUN", "--file", "bad.csv", "--out", "./bad.csv"], "bad.csv is a file that is read"),
        (["RUN", "--file", "*.csv", "--out", "bad.csv"], "bad.csv is a file that is read"),
        (["RUN", "--file", "nowhere.csv"], "nowhere.csv"),
        (["RUN", "--file", "taken.csv"], "taken.csv:2: there is a column 'predicted' already"),
        (["RUN", "--file", "bad.csv"], "bad.csv:3: the text is missing (column 'text')"),
        (["RUN", " "], "' ' has no token"),
        (["BASE", "a text"], "is a language model without classes: gptsmith finetune"),
        (["nowhere", "a text"], "there is no run folder nowhere"),
        ([], "--run is required"),
    ],
)
def test_user_errors_of_classify(tuned, base, tmp_path, user_error, monkeypatch, argv, says):
    monkeypatch.chdir(tmp_path)
    Path("bad.csv").write_text("text,n\nabc,1\n,2\n")
    Path("taken.csv").write_text("text,predicted\nabc,ham\n")
    named = {"RUN": str(tuned), "BASE": str(base)}
    assert says in user_error("classify", *(named.get(word, word) for word in argv))
    assert not Path("x.csv").exists()
