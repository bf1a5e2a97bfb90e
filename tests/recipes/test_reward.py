"""Reinforcement learning as a whole: it learns what is rewarded, resumes exactly, on any ranks."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import judge_server
import local_web
import pytest
from chats import OURS
from ranks import on, scale
from runs import (
    assert_same_checkpoints,
    assert_same_weights,
    events,
    finish,
    kill_after,
    losses,
    stop_at,
    untrained,
)

from gptsmith import cli
from gptsmith.run import Run
from gptsmith.train import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 7
WORDS = [
    "finetune", "reward", "--data", "prompts.jsonl", "--prompts-per-step", "4", "--group-size", "4",
    "--max-new-tokens", "8", "--val-prompts", "4", "--val-fraction", "0.3", "--reward",
    "regex:[a-m]", "--train.steps", str(STEPS), "--train.batch-size", "4", "--train.num-threads",
    "1", "--train.device", "cpu", "--train.precision", "fp32", "--save.seconds", "600",
    "--save.interval", "1", "--save.keep-last", "9", "--eval.interval", "3", "--optim.warmup-steps",
    "2", "--optim.kind", "adamw", "--optim.learning-rate", "0.003", "--monitor.trackers", "none",
]  # fmt: skip
TIMED = {"seconds", "tokens_per_second", "peak_memory_mb", "crc32", "train_sampling_share"}
CODE = """
def letters(prompt, completion, row):
    return sum(c.islower() for c in completion) / 8
"""


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model that has learned nothing."""
    return untrained(tmp_path_factory.mktemp("chat") / "run", OURS.tokenizer, OURS.source)


@pytest.fixture
def words(chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"Say {n}!", "answer": str(n)} for n in range(20)]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("code.py").write_text(CODE)
    return [*WORDS, "--from", str(chat)]


def record(run: Path) -> list[dict]:
    """Without what depends on the clock."""
    found = events(run, "train", "val", "sample")
    return [{k: v for k, v in e.items() if k not in TIMED} for e in found]


def test_learns_what_is_rewarded(words):
    more = ["--train.steps", "24", "--prompts-per-step", "8", "--eval.interval", "12", "--reward"]
    more += ["code.py:letters", "--trust-code", "--optim.learning-rate", "0.01", "--out", "run"]
    more += ["--optim.schedule", "constant"]
    assert cli.main([*words, *more]) == 0
    run, train = Path("run"), events(Path("run"), "train")
    rewards = [event["train_reward"] for event in train]
    assert sum(rewards[:5]) / 5 < 0.7  # of 2
    assert sum(rewards[-5:]) / 5 > 1.4
    val = [event["val_reward"] for event in events(run, "val")]
    assert val[-1] > 1.4 > val[0]
    assert {
        "train_reward", "train_reward_std", "train_no_signal", "train_length", "train_truncated",
        "train_sampling_share", "train_entropy", "train_clipped",
    } <= train[0].keys()  # fmt: skip
    assert all(0 < event["train_sampling_share"] < 1 for event in train)
    samples = (run / "samples.txt").read_text()
    assert re.search(r"\[best: reward [\d.]+\]\n.*\[worst: reward [\d.]+\]", samples, re.DOTALL)
    columns = (run / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train_reward", "val_reward", "train_reward_regex_a_m"} <= {*columns}
    assert "| validation reward |" in (run / "report.md").read_text()
    assert (run / "curves.png").stat().st_size > 10_000
    assert Run.open(run).stage == "reward"
    assert Run.open(run).chat_template is not None
    assert Run.open(run).load_model() is not None


FULL = ["--updates", "2", "--kl", "0.05"]
LORA = ["--updates", "3", "--kl", "0.05", "--lora.rank", "2", "--normalize", "sequence"]
QLORA = [*LORA, "--lora.targets", "qkv", "--quantize", "nf4"]


def test_killed_in_the_middle_of_a_rollout_and_resumed_without_its_base(words, chat, tmp_path):
    base = shutil.copytree(chat, tmp_path / "base")
    words = [*words, *FULL, "--from", str(base)]
    finish([*words, "--out", "whole"])
    kill_after(3, [*words, "--out", "run"], Path("run"))  # of the rollout of steps 3 and 4
    shutil.rmtree(base)
    finish([*words, "--out", "run", "--resume"])
    assert_same_checkpoints(Path("whole"), Path("run"))
    assert_same_weights(Path("whole"), Path("run"))
    assert record(Path("whole")) == record(Path("run"))


@pytest.mark.parametrize("options", [[], QLORA], ids=["full", "qlora"])
@pytest.mark.parametrize("step", [2, 3])
def test_resumes_bit_exactly(words, options, step):
    assert cli.main([*words, *options, "--out", "whole"]) == 0
    run = stop_at(step, Path("whole"), Path("run"))
    assert checkpoint.find(run / "checkpoints")[0].step == step
    assert cli.main([*words, *options, "--out", "run", "--resume"]) == 0
    assert_same_checkpoints(Path("whole"), run)
    assert record(Path("whole")) == record(run)
    if options:
        assert any("kl" in name for name in events(run, "train")[0])


@pytest.mark.parametrize(
    "options", [pytest.param([], marks=scale), FULL, pytest.param(LORA, marks=scale)]
)
def test_two_ranks_practise_as_one_process_does(words, options):
    """Adam's first steps are the signs of gradients, some of which are nothing but rounding: at a
    low learning rate that does not matter."""
    words = [*words, *options, "--train.batch-size", "8", "--optim.learning-rate", "1e-6"]
    on(1, [*words, "--out", "one"])
    on(2, [*words, "--out", "two"])
    assert losses(Path("one")) == pytest.approx(losses(Path("two")), abs=1e-4)
    for a, b in zip(record(Path("one")), record(Path("two")), strict=True):
        for name in ("step", "train_reward", "train_reward_std", "train_length", "val_reward"):
            assert a.get(name) == b.get(name)
        assert (a.get("title"), a.get("text")) == (b.get("title"), b.get("text"))


@scale
@pytest.mark.parametrize("options", [[], FULL, LORA])
def test_two_ranks_practise_with_a_sharded_model(words, options):
    words = [*words, *options, "--optim.learning-rate", "1e-6"]
    on(1, [*words, "--out", "one"])
    on(2, [*words, "--train.shard", "--out", "two"])
    assert losses(Path("one")) == pytest.approx(losses(Path("two")), abs=1e-4)
    assert Run.open("two").load_model() is not None


@pytest.fixture
def rejected(words: list[str], user_error: Callable[..., str]) -> Callable[..., str]:
    return lambda *more: user_error(*words, "--out", "run", *more)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--dropout", "0.1"], "dropout 0.1: completions are sampled without it"),
        (
            ["--lora.rank", "2", "--lora.dropout", "0.1"],
            "lora.dropout 0.1: completions are sampled",
        ),
        (["--reward-weights", "1", "--reward-weights", "2"], "2 reward_weights for 1 rewards"),
        (["--reward", "regex:[a-m]"], "reward regex:[a-m] is given twice: give it once, and raise"),
        (["--group-size", "1"], "greater than or equal to 2"),
        (
            ["--group-size", "3", "--prompts-per-step", "3"],
            "group_size 3 = 9 is not a multiple",
        ),
        (
            ["--prompts-per-step", "1000"],
            "than the 16 prompts to train on: give --prompts-per-step 16",
        ),
        (["--max-new-tokens", "64"], "leaves no room for a prompt"),
        (["--max-new-tokens", "60"], "no prompts left: longer than 4 tokens: 20"),
        (["--reward", "exakt"], "no reward 'exakt'"),
        (["--reward", "code.py:letters"], "review it, then pass --trust-code"),
        (
            ["--reward", "http://localhost:9#ok", "--judge.retries", "0"],
            "/v1/classify is not reachable",
        ),
        (
            [
                "--reward",
                "judge",
                "--judge.url",
                "http://localhost:9",
                "--judge.model",
                "judge",
                "--judge.retries",
                "0",
            ],
            "reward judge: http://localhost:9/v1/chat/completions is not reachable",
        ),
        (["--data", "skills"], "do not mix it with files"),
        (["--val", "skills"], "--val skills: the built-in set is for --data"),
        (["--train.precision", "fp8"], "one that is evaluated in bf16; use bf16 or auto"),
        (["--train.compile", "on"], "completions have many lengths"),
        (["--eval.tokens", "9"], "--eval.tokens"),
        (["--eval.prompt", "Say"], "--eval.prompt"),
        (["--eval.sample-tokens", "9"], "--eval.sample-tokens"),
        (["--train.total-batch-tokens", "640"], "use --prompts-per-step and --group-size"),
        (["--prompt-column", "x"], "no column 'x'"),
        (["--data", "open.jsonl"], "prompts.jsonl:21: no expected answer to compare with"),
        (["--dropout", "none"], "dropout None: completions are sampled without it"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_written(rejected, options, says):
    if options == ["--data", "skills"]:
        options = [*options, "--data", "prompts.jsonl"]
    if options == ["--data", "open.jsonl"]:
        with Path("prompts.jsonl").open("a") as file:
            file.write('{"question": "Say something!"}\n')
        options = ["--reward", "exact"]
    assert says in rejected(*options)
    assert not os.path.exists("run")


def test_a_reference_that_was_not_kept_is_said_in_one_line(words, user_error):
    words = [*words, "--train.steps", "1", "--out", "run"]
    assert cli.main(words) == 0
    kept = Path("run/config.yaml").read_bytes()
    more = ["--resume", "--train.steps", "2", "--kl", "0.05"]
    assert "resume with --kl 0, or start another run" in user_error(*words, *more)
    assert Path("run/config.yaml").read_bytes() == kept


def test_resume_is_advised_once_there_is_a_checkpoint(words, capsys):
    answers = 0

    def reply(prompt: str, before: int) -> judge_server.Reply:
        if len(server.asked) > answers:
            return 404, {}, "gone"
        return json.dumps({"reason": "so", "score": 50})

    server = judge_server.Server(reply)
    words = [*words, "--reward", "judge", "--judge.model", "judge", "--judge.url", server.url]
    words += ["--judge.protocol", "openai", "--judge.parallel", "1"]
    with local_web.running(server):
        assert cli.main([*words, "--out", "one"]) == 2
        assert capsys.readouterr().err.endswith("reward judge: HTTP 404: gone\n")
        assert not Path("one").exists()
        answers = len(server.asked) + 4  # those of the first evaluation
        assert cli.main([*words, "--out", "two"]) == 2
    assert capsys.readouterr().err.endswith("reward judge: HTTP 404: gone; --resume continues\n")
    assert checkpoint.steps(Path("two/checkpoints"))


def test_a_run_that_failed_before_its_first_checkpoint_is_not_in_the_way(words, capsys):
    words = [*words, "--reward", "code.py:letters", "--trust-code", "--train.steps", "1"]
    Path("code.py").write_text("def letters(prompt, completion, row):\n    return 1 / 0\n")
    assert cli.main([*words, "--out", "run"]) == 2
    assert "raises ZeroDivisionError" in capsys.readouterr().err
    assert Path("run/config.yaml").exists()
    Path("code.py").write_text(CODE)
    assert cli.main([*words, "--out", "run"]) == 0


def test_the_best_value_is_shown_with_its_sign(words, capsys):
    Path("code.py").write_text("def less(prompt, completion, row):\n    return -0.5\n")
    more = ["--reward", "code.py:less", "--trust-code", "--train.steps", "2", "--out", "run"]
    words = [word for word in words if word not in ("--reward", "regex:[a-m]")]
    assert cli.main([*words, *more]) == 0
    notes = [event["message"] for event in events(Path("run"), "note")]
    before = "no evaluation was better than the one before training (-0.5): "
    equal = "the completions of each prompt had equal rewards, so there was nothing to learn from"
    assert any(note.startswith(before + equal) for note in notes)
    assert cli.main(["inspect", "run"]) == 0
    assert "best val_reward -0.5000 at step 0" in " ".join(capsys.readouterr().out.split())


def test_a_run_without_any_reward_says_why_it_learned_nothing(words):
    more = ["--reward", "regex:never", "--train.steps", "2", "--out", "run"]
    assert cli.main([*[w for w in words if w not in ("--reward", "regex:[a-m]")], *more]) == 0
    [note] = [e["message"] for e in events(Path("run"), "note") if "no evaluation" in e["message"]]
    assert "(0): no completion got a reward, so there was nothing to learn from" in note


def test_resume_refuses_code_and_rows_that_have_changed(words, user_error):
    words = [*words, "--reward", "code.py:letters", "--trust-code", "--train.steps", "1"]
    assert cli.main([*words, "--out", "run"]) == 0
    for name in ("code.py", "prompts.jsonl"):
        before = Path(name).read_text()
        Path(name).write_text(before.replace("/ 8", "/ 9").replace("}", ', "more": 1}', 1))
        message = user_error(*words, "--out", "run", "--resume", "--train.steps", "2")
        assert "data" in message
        Path(name).write_text(before)
    assert cli.main([*words, "--out", "run", "--resume", "--train.steps", "2"]) == 0


@pytest.mark.parametrize(
    "options",
    [
        ["--lora.rank", "2", "--lora.targets", "qkv", "--quantize", "nf4"],
        ["--freeze", "embedding.*", "--kl", "0.05"],
    ],
    ids=["quantized", "frozen"],
)
def test_parts_of_the_weights_are_trained(words, options):
    assert cli.main([*words, *options, "--train.steps", "2", "--out", "run"]) == 0
    assert len(losses(Path("run"))) == 2
    assert Run.open("run").load_model() is not None


def test_the_built_in_questions_may_be_validated_on_a_file(words):
    words = ["skills" if word == "prompts.jsonl" else word for word in words]
    more = ["--val", "prompts.jsonl", "--questions", "8", "--train.steps", "1", "--out", "run"]
    assert cli.main([*words, *more, "--eval.interval", "1", "--val-prompts", "20"]) == 0
    assert any("; 20 for validation" in e["message"] for e in events(Path("run"), "note"))


def test_a_model_without_template_practises_on_plain_prompts(words, base, user_error):
    words = [*words, "--from", str(base)]
    skills = ["skills" if word == "prompts.jsonl" else word for word in words]
    assert "make one first" in user_error(*skills, "--out", "run")
    assert cli.main([*words, "--train.steps", "2", "--out", "run"]) == 0
    assert Run.open("run").chat_template is None
