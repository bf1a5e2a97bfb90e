"""`gptsmith evaluate`: any text, strided windows, tasks, responses, two runs compared."""

import json
import math
import signal
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from judge_server import Server
from local_web import running
from runs import random_run

from gptsmith.data.options import ReadOptions
from gptsmith.data.report import ReadReport
from gptsmith.data.sources import encode_source
from gptsmith.model.config import ModelConfig
from gptsmith.run import Run
from gptsmith.run.create import create_from_weights
from gptsmith.tokenizer import Tokenizer

T = 16
BYTES = Tokenizer.byte()
CONFIG = ModelConfig(n_layer=1, n_head=2, n_embd=16, context_length=T, vocab_size=257)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return random_run(folder / "one", CONFIG).path, random_run(folder / "two", CONFIG, seed=2).path


TEXTS = ["The smith forged a ring, and another one.", "É quite other text."]


@pytest.fixture
def text(tmp_path) -> Path:
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "text.jsonl").write_text(rows)
    return tmp_path / "text.jsonl"


def test_text_becomes_one_stream(text):
    eos = BYTES.eos_id
    expected = [token for t in TEXTS for token in (eos, *t.encode())]
    assert encode_source(str(text), BYTES, ReadOptions(), ReadReport())[0].tolist() == expected


@pytest.mark.parametrize(("window", "stride"), [(T, T), (T, 5), (10, 3), (12, 1)])
def test_every_token_is_a_target_once_with_the_context_of_its_window(
    evaluate, runs, text, tmp_path, window, stride
):
    out = tmp_path / "out.json"
    argv = (runs[0], "--data", text, "--window", window, "--stride", stride, "--out", out)
    code, _, err = evaluate(*argv, "--precision", "fp32")
    assert (code, err) == (0, "")
    model, ids = (
        Run.open(runs[0]).load_model(),
        encode_source(str(text), BYTES, ReadOptions(), ReadReport())[0].astype(np.int64),
    )
    nats = 0.0
    for target in range(1, len(ids)):  # token by token, with the window that it falls in
        begin = 0 if target <= window else -(-(target - window) // stride) * stride
        with torch.no_grad():
            logits = model(torch.from_numpy(ids[None, begin:target]))[0, -1]
        nats += float(F.cross_entropy(logits, torch.tensor(ids[target])))
    found = json.loads(out.read_text())["perplexity"]
    size = sum(len(t.encode()) for t in TEXTS)
    assert found["n"] == len(ids) - 1
    assert found["val_loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_tasks_of_two_runs(evaluate, runs, tmp_path):
    rows = [
        {"ctx": f"{n} and", "endings": [f"{n + i}" for i in range(4)], "label": n % 4}
        for n in range(12)
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    responses = [{"instruction": "say a", "output": "a", "response": r} for r in ("a", "b")]
    (tmp_path / "r.json").write_text(json.dumps(responses))
    out = tmp_path / "out.json"
    code, shown, err = evaluate(
        runs[0], "--tasks", "hellaswag_gpt2,text", "--task-data", tmp_path / "q.jsonl", "--limit",
        "8", "--responses", tmp_path / "r.json", "--compare", runs[1], "--out", out,
    )  # fmt: skip
    assert code == 0, err
    for word in ("one", "two", "hellaswag_gpt2", "acc_token", "GPT-2 124M", "exact_match"):
        assert word in shown
    found = json.loads(out.read_text())
    assert found["hellaswag_gpt2"]["n"] == found["compare"]["hellaswag_gpt2"]["n"] == 8
    assert found["text"]["exact_match"] == 0.5
    lines = [json.loads(x) for x in (tmp_path / "out.items.jsonl").read_text().splitlines()]
    mine = [x for x in lines if x["run"] == "one" and x["task"] == "hellaswag_gpt2"]
    assert len(mine) == 8
    assert found["hellaswag_gpt2"]["acc"] == pytest.approx(sum(x["acc"] for x in mine) / 8)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out.pdf").read_bytes().startswith(b"%PDF")


def test_runs_with_equal_names_markup_and_other_tokenizers(
    evaluate, runs, text, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    one = random_run(tmp_path / "sub" / "x[b]", CONFIG).path
    tokenizer = BYTES.add_special_tokens(["<|user|>"])
    random_run(tmp_path / "x[b]", CONFIG.change(vocab_size=258), tokenizer)
    code, out, err = evaluate(one, "--data", text, "--compare", "x[b]", "--out", "new/out.json")
    assert code == 0
    assert str(one) in out.replace("\n", "")
    assert "only bits_per_byte can be compared" in err
    found = json.loads(Path("new/out.json").read_text())
    assert found["compare"]["run"] == "x[b]"
    assert found["compare"]["perplexity"]["val_loss"] != found["perplexity"]["val_loss"]


def test_texts_are_compared_window_by_window(evaluate, runs, text, tmp_path):
    out = tmp_path / "out.json"
    code, shown, err = evaluate(runs[0], "--data", text, "--compare", runs[1], "--out", out)
    assert (code, err) == (0, "")
    assert "difference [95%]" in shown
    paired = json.loads(out.read_text())["compare"]["paired"]["perplexity"]
    for metric in ("val_loss", "perplexity", "bits_per_byte"):
        low, high = paired[metric]["interval_95"]
        assert low < paired[metric]["difference"] < high
    items = [json.loads(x) for x in (tmp_path / "out.items.jsonl").read_text().splitlines()]
    mine = [item for item in items if item["run"] == "one"]
    nats, tokens = (sum(item[name] for item in mine) for name in ("nats", "tokens"))
    assert nats / tokens == pytest.approx(paired["val_loss"]["one"])
    assert sum(item["bytes"] for item in mine) == sum(len(t.encode()) for t in TEXTS)


def test_truncated_question_has_a_note(evaluate, runs, tmp_path):
    row = {"ctx": "much longer than the context", "endings": ["a", "b"], "label": 0}
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"ctx": "short"}))
    code, _, err = evaluate(
        runs[0], "--tasks", "hellaswag_gpt2", "--task-data", tmp_path / "q.jsonl"
    )
    assert code == 0
    assert "1 of 2 questions are truncated on the left" in err


def test_runs_of_different_corpora_need_data(evaluate, tmp_path):
    for name in ("a", "b"):
        random_run(tmp_path / name, CONFIG)
        with (tmp_path / name / "config.yaml").open("a") as file:
            file.write(f"data: data/{name}\n")
        (tmp_path / name / "digests.json").unlink()
    code, out, err = evaluate(tmp_path / "a", "--compare", tmp_path / "b")
    assert (code, out) == (2, "")
    assert "data/a and data/b: give the text for both with --data" in err


def test_text_column_of_a_table(evaluate, runs, tmp_path):
    (tmp_path / "t.csv").write_text("one,two\na,The smith forged a ring\n")
    code, _, err = evaluate(runs[0], "--data", tmp_path / "t.csv")
    assert code == 2
    assert "--text-column NAME" in err
    code, out, _ = evaluate(runs[0], "--data", tmp_path / "t.csv", "--text-column", "two")
    assert code == 0
    assert "23 tokens" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--data TEXT --tasks perplexity,judge --responses ANSWERS", "no judge: name a model"),
        ("--data TEXT --tasks perplexity,text", "finetune instruct"),
        ("--data TEXT --tasks perplexity,piqa --task-data nowhere", "nowhere"),
        ("--data TEXT --out out.png", "--out out.png: name a file that ends in .json"),
        ("--data TEXT --out out", "--out out: name a file that ends in .json"),
        ("--data TEXT --out FOLDER", "is a folder: name a file"),
        ("--tasks text --responses ANSWERS --out ANSWERS", "answers.json is a file that is read"),
        ("--tasks ANSWERS --out ANSWERS", "answers.json is a file that is read: name another"),
        ("--tasks helaswag", "--tasks: no task 'helaswag': did you mean 'hellaswag'?"),
        ("--tasks hellaswag --task-data nowhere", "nowhere"),
        ("--tasks hellaswag --shots 10", "--shots 10 is for gsm8k, mmlu, not hellaswag"),
        ("--data TEXT --stride 17", "--stride 17 is more than the window of 16"),
        ("--data TEXT --window 17", "--window 17 is more than the model's context of 16"),
        ("--data EMPTY", "no text in it"),
        ("--tasks text", "finetune instruct"),
        ("--compare RUN", "is the run itself"),
        ("", "was not trained on a prepared corpus: give --data"),
    ],
)
def test_wrong_input_is_one_line(evaluate, runs, text, tmp_path, argv, message):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder.json").mkdir()
    names = {"TEXT": text, "EMPTY": tmp_path / "empty.txt", "RUN": runs[0]}
    names |= {"FOLDER": tmp_path / "folder.json", "ANSWERS": tmp_path / "answers.json"}
    names["ANSWERS"].write_text(json.dumps([{"output": "a", "response": "b"}]))
    code, out, err = evaluate(runs[0], *(names.get(word, word) for word in argv.split()))
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1
    assert out == ""


def test_results_before_a_failing_judge_are_kept(evaluate, runs, tmp_path):
    rows = [{"instruction": "say a", "output": "a", "response": r} for r in ("a", "b")]
    (tmp_path / "r.json").write_text(json.dumps(rows))
    out = tmp_path / "out.json"
    with socket.socket() as taken:  # bound, but not listening
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        code, shown, err = evaluate(
            runs[0], "--tasks", "text,judge", "--responses", tmp_path / "r.json", "--out", out,
            "--judge.url", url, "--judge.model", "m", "--judge.retries", "0",
        )  # fmt: skip
    assert code == 2
    assert "127.0.0.1" in err
    assert "exact_match" in shown
    assert json.loads(out.read_text())["text"]["exact_match"] == 0.5


def test_results_before_ctrl_c_are_kept(evaluate, runs, tmp_path):
    rows = [{"instruction": "say a", "output": "a", "response": "a"}]
    (tmp_path / "r.json").write_text(json.dumps(rows))
    out, main_thread = tmp_path / "out.json", threading.main_thread().ident

    def interrupt(prompt, before):
        signal.pthread_kill(main_thread, signal.SIGINT)
        return '{"score": 1}'

    server = Server(interrupt)
    with running(server):
        code, shown, err = evaluate(
            runs[0], "--tasks", "text,judge", "--responses", tmp_path / "r.json",
            "--judge.url", server.url, "--judge.model", "m",
            "--out", out,
        )  # fmt: skip
    assert code == 130
    assert "interrupted" in err
    assert "exact_match" in shown
    assert json.loads(out.read_text())["text"]["exact_match"] == 1


def test_half_precision_weights_are_not_converted(evaluate, runs, text, tmp_path):
    halves = ((n, t.bfloat16()) for n, t in Run.open(runs[0]).load_model().state_dict().items())
    half = tmp_path / "half"
    create_from_weights(half, {"import": "test"}, CONFIG, BYTES, halves, torch.bfloat16)
    losses = []
    for run, precision in ((runs[0], "fp32"), (half, "bfloat16")):
        out = tmp_path / "out.json"
        code, shown, _ = evaluate(run, "--data", text, "--out", out)
        assert code == 0
        assert f"precision     {precision}, that of the weights" in shown
        losses.append(json.loads(out.read_text())["perplexity"]["val_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


# --- files of questions, and what is compared ----------------------------------------------------


def test_file_of_questions_of_two_runs(evaluate, runs, tmp_path):
    quiz = tmp_path / "quiz, the second.csv"
    rows = [f"What is {n}?,a{n},b,c,{'d' if n % 2 else ''},{'ABC'[n % 3]}\n" for n in range(12)]
    quiz.write_text("question,A,B,C,D,answer\n" + "".join(rows))
    out = tmp_path / "out.json"
    code, shown, err = evaluate(runs[0], "--tasks", quiz, "--compare", runs[1], "--out", out)
    assert code == 0, err
    found = json.loads(out.read_text())
    assert found[str(quiz)]["n"] == 12
    paired = found["compare"]["paired"][str(quiz)]
    for metric in ("acc", "acc_norm", "acc_token"):
        one = paired[metric]
        assert one["difference"] == pytest.approx(one["one"] - one["two"])
        assert one["interval_95"][0] <= one["difference"] <= one["interval_95"][1]
    assert f"{(6 / 3 + 6 / 4) / 12:.1%}" in shown  # chance


def test_runs_that_answered_other_items_are_compared_on_the_common_ones(evaluate, tmp_path):
    """A choice that does not fit into one model's context."""
    long, short = (
        random_run(tmp_path / name, CONFIG.change(context_length=T)).path
        for name, T in (("long", 64), ("short", 16))
    )
    rows = [
        {"question": "q", "choices": ["x" * (30 if n % 3 else 3), "y"], "answer": n % 2}
        for n in range(12)
    ]
    (tmp_path / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, shown, err = evaluate(long, "--tasks", tmp_path / "quiz.jsonl", "--compare", short)
    assert code == 0
    assert "8 of 12 questions are left out" in err
    assert "compared on the 4 items that both runs have" in err
    assert "long alone: 12 items" in err
    assert "12" not in shown.replace("quiz.jsonl", "").partition("items")[2].partition("acc")[0]


def test_same_responses_of_two_runs_are_no_comparison(evaluate, runs, tmp_path):
    rows = [{"instruction": "say a", "output": "a", "response": r} for r in ("a", "b")]
    (tmp_path / "r.json").write_text(json.dumps(rows))
    code, shown, err = evaluate(
        runs[0], "--tasks", "judge,text", "--responses", tmp_path / "r.json", "--compare", runs[1],
        "--judge.url", "http://127.0.0.1:9", "--judge.model", "m", "--judge.retries", "0",
    )  # fmt: skip
    assert code == 2  # nobody is there to judge
    code, shown, err = evaluate(
        runs[0], "--tasks", "text", "--responses", tmp_path / "r.json", "--compare", runs[1]
    )
    assert code == 0
    assert "both runs are scored on the same responses" in err
    assert "+0.0" in shown
