"""Instruction tuning from end to end: a base run and rows in, a run that answers out."""

import json
from itertools import product
from pathlib import Path

import pytest
from runs import assert_same_weights, events, kill_after

from gptsmith import cli
from gptsmith.chat_template.template import ChatTemplate
from gptsmith.data.instructions import Prompt
from gptsmith.generate.engine import Engine
from gptsmith.generate.options import SamplingConfig
from gptsmith.recipes.instruct import instruct_section
from gptsmith.run import Run

CONFIGS = Path(__file__).parents[2] / "configs" / "finetune"
PROMPT = "{instruction} {input}\nA:\n"  # short: the classic one is 160 bytes
WORDS = ["".join(word) for word in product("ab", "cd", "ef", "ab")]
ROWS = [
    {"instruction": what, "input": word, "output": word.upper() if what == "Shout" else word}
    for what in ("Shout", "Repeat")
    for word in WORDS
]
SMALL = [
    "--train.batch-size", "8", "--train.num-threads", "1", "--monitor.trackers", "none",
    "--responses", "4", "--response-tokens", "12", "--eval.sample-tokens", "12",
    "--optim.learning-rate", "0.01", "--optim.warmup-steps", "5",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.json"
    path.write_text(json.dumps(ROWS))
    return path


def words(base: Path, data: Path, out: Path, *more: str) -> list[str]:
    where = ["--from", str(base), "--data", str(data), "--out", str(out)]
    shares = ["--val-fraction", "0.1", "--test-fraction", "0.2"]
    return ["finetune", "instruct", *where, *shares, *SMALL, "--prompt", PROMPT, *more]


def test_learns_to_answer_and_to_stop(base, data, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(words(base, data, out, "--train.steps", "150", "--eval.interval", "50")) == 0
    validations = events(out, "val")
    assert validations[0]["step"] == 0
    assert validations[-1]["val_loss"] < validations[0]["val_loss"] / 2
    responses = json.loads((out / "responses.json").read_text())
    assert [list(r) for r in responses] == [
        ["instruction", "input", "output", "response", "stopped"]
    ] * 4
    assert all(r["stopped"] for r in responses)
    rows = [(r["instruction"], r["input"], r["output"]) for r in responses]
    assert all(dict(zip(("instruction", "input", "output"), r, strict=True)) in ROWS for r in rows)
    said = capsys.readouterr().err
    assert "4 of 4 answers to test instructions ended with the stop token" in said
    report = (out / "report.md").read_text()
    assert "\n".join(instruct_section(Run.open(out))) in report
    assert f"Instruction: {responses[0]['instruction']}" in report

    # The stored template writes the same prompts as the recipe.
    run = Run.open(out)
    template = ChatTemplate(run.template, run.tokenizer)
    assert run.template == Prompt.parse(PROMPT).template("<|endoftext|>")
    asked = [{"role": "user", "content": f"{r[0]} {r[1]}"} for r in rows]
    answers = Engine(run.load_model(), run.tokenizer).generate(
        [template.prompt([message]) for message in asked],
        SamplingConfig(max_new_tokens=12, temperature=0),
        stop_ids=template.stop_ids,
    )
    assert [a.text for a in answers] == [r["response"] for r in responses]
    names = ("val_fraction", "test_fraction", "split_seed")
    assert [run.config[name] for name in names] == [0.1, 0.2, 0]


def test_test_split_is_independent_of_the_training_settings(base, data, tmp_path):
    """Split by seed and text: LoRA, an unmasked prompt, another order of training."""
    asked = []
    for n, more in enumerate(
        (["--lora.rank", "2"], ["--no-mask-prompt", "--no-pack"], ["--split-seed", "1"])
    ):
        out = tmp_path / str(n)
        steps = ["--train.steps", "2", "--train.seed", str(n)]
        assert cli.main(words(base, data, out, *steps, *more)) == 0
        responses = json.loads((out / "responses.json").read_text())
        asked.append([(r["instruction"], r["input"]) for r in responses])
    assert asked[0] == asked[1]
    assert asked[0] != asked[2]
    assert (tmp_path / "0" / "adapter" / "adapter_config.json").is_file()
    losses = [events(tmp_path / n, "val")[0]["val_loss"] for n in "01"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # the answers alone, mask or no mask


def test_killed_and_resumed_run_is_bit_exact(base, data, tmp_path):
    argv = words(base, data, tmp_path / "straight", "--train.steps", "40", "--lora.rank", "2")
    argv += ["--save.interval", "5", "--save.keep-last", "99"]
    assert cli.main(argv) == 0
    out = tmp_path / "killed"
    argv[argv.index(str(tmp_path / "straight"))] = str(out)
    kill_after(10, argv, out)
    assert cli.main(["finetune", "instruct", "--out", str(out), "--resume"]) == 0
    assert_same_weights(tmp_path / "straight", out)
    texts = [(tmp_path / n / "responses.json").read_text() for n in ("straight", "killed")]
    assert texts[0] == texts[1]


def test_chat_model_keeps_its_template(base, data, tmp_path):
    """Tuned again without --prompt, the run asks as it was taught, not as Alpaca does."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert cli.main(words(base, data, first, "--train.steps", "1")) == 0
    argv = words(first, data, second, "--train.steps", "1")
    del argv[argv.index("--prompt") : argv.index("--prompt") + 2]
    assert cli.main(argv) == 0
    assert Run.open(second).template == Run.open(first).template


@pytest.mark.parametrize("recipe", ["alpaca", "instruct-small"])
def test_recipes(recipe, base, data, tmp_path):
    argv = words(base, data, tmp_path / "run", "--train.steps", "1", "--train.epochs", "none")
    argv.insert(2, str(CONFIGS / f"{recipe}.yaml"))
    assert cli.main([*argv, "--context-length", "64"]) == 0
    assert len(json.loads((tmp_path / "run" / "responses.json").read_text())) == 4


def test_skipped_rows_are_listed_in_the_notes(base, tmp_path):
    """Also under other names of the columns."""
    rows = [{"q": r["instruction"], "input": r["input"], "a": r["output"]} for r in ROWS]
    rows += [{"q": "Say it", "a": "x" * 80}, {"q": "Hm", "a": ""}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    out = tmp_path / "run"
    argv = words(base, path, out, "--train.steps", "1", "--responses", "0")
    assert cli.main([*argv, "--columns.instruction", "q", "--columns.output", "a"]) == 0
    notes = [e["message"] for e in events(out, "note")]
    assert (
        f"data: skipped, longer than the context of 64 tokens: 1 ({path}:{len(rows) - 1})" in notes
    )
    assert f"data: skipped, no answer: 1 ({path}:{len(rows)})" in notes
    assert not (out / "responses.json").exists()


@pytest.mark.parametrize(
    ("answered", "says"),
    [
        (0, ["no rows left for training", "skipped, no answer: 4"]),
        (1, ["skipped, no answer: 3;", "use more rows"]),
    ],
)
def test_rows_left_out_are_named_where_too_few_remain(base, tmp_path, user_error, answered, says):
    rows = [{"instruction": f"Say {n}", "output": "x" * (n < answered)} for n in range(4)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    said = user_error(*words(base, path, tmp_path / "run"))
    assert said.index(says[0]) < said.index(says[1])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--columns.output", "reply"], "no column 'reply'; choose the output from 'instruction'"),
        (["--prompt", "Say something:\n"], "{instruction}"),
        (["--val-fraction", "0.001"], "use more rows"),
        (["--context-length", "8"], "no rows left for training"),
        (["--context-length", "65"], "more than the model's 64"),
        (["--data", "nowhere.json"], "nowhere.json"),
    ],
)
def test_user_errors(base, data, tmp_path, user_error, more, says):
    assert says in user_error(*words(base, data, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()
