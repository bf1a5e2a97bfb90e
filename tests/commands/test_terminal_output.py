"""What people see of hostile names, labels, files and model output, in a real terminal."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from prepared import run as prepare
from pseudo_terminal import shown
from runs import random_run

import gptsmith
from gptsmith.chat_template.template import CHAT_TOKENS, TEMPLATE
from gptsmith.model.config import ModelConfig
from gptsmith.terminal import visible
from gptsmith.tokenizer import Tokenizer

NAME = "[b]\x1b]0;x\x07\x9b2J\u202e\x7f\r"  # brackets are markup for rich
TOKENIZER = Tokenizer.char([f"{NAME}\x08\x0c\u2066\ufeff abc"]).add_special_tokens(CHAT_TOKENS)
CONFIG = ModelConfig(
    n_layer=1, n_head=2, n_embd=16, context_length=32, vocab_size=TOKENIZER.vocab_size
)
ANGRY = "{% for m in messages %}{% if m.content == 'a' %}{{ raise_exception('no \x1b]0;x\x07') }}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("hostile")
    run = random_run(folder / f"lm{NAME}", CONFIG, TOKENIZER, TEMPLATE).path
    other = random_run(folder / f"other{NAME}", CONFIG, TOKENIZER, seed=2).path
    events = [
        {"event": "val", "step": 1, "val_loss": 2.0},
        {"event": "tasks", "step": 1, f"acc{NAME}": 0.5},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    labels = (f"ham{NAME}", f"spam{NAME}")
    classes = random_run(folder / "classes", CONFIG.change(labels=labels), TOKENIZER).path
    angry = random_run(folder / "angry", CONFIG, TOKENIZER, TEMPLATE).path
    end = "{% endif %}{% endfor %}"
    (angry / "chat_template.jinja").write_text(f"{ANGRY}{end}{TEMPLATE}")
    (angry / "digests.json").unlink()
    text = folder / f"text{NAME}.txt"
    text.write_text(f"abc {NAME} cab {NAME}\n".replace("\n", " ") * 40, newline="")
    corpus = prepare(folder / f"corpus{NAME}", text).path
    manifest = json.loads((corpus / "manifest.json").read_text())
    del manifest["digest"]  # as in corpora of earlier versions
    (corpus / "manifest.json").write_text(json.dumps({**manifest, "name": NAME}))
    return SimpleNamespace(
        folder=folder, run=run, other=other, classes=classes, angry=angry, text=text, corpus=corpus
    )


def check(text: str, *parts: str) -> None:
    assert text == visible(text)
    for part in parts:
        assert part in text
    assert r"\x1b]0;x\x07\x9b2J\u202e\x7f\r" in text


def test_generated_text(made: SimpleNamespace) -> None:
    live = shown(["generate", made.run, "--prompt", NAME, "--max-new-tokens", 25])
    check(live, visible(NAME))
    assert len(live) > len(visible(NAME)) + 40
    several = shown(
        ["generate", made.run, "--num-samples", 3, "--max-new-tokens", 25, "--prompt", NAME],
        ["generate", made.run, "--prompt", NAME, "--prompt", "a", "--max-new-tokens", 25],
    )
    check(several, "--- seed 2\n", "--- seed 0, prompt '[b]\\x1b]")


def test_generated_text_is_exact_in_a_file(made: SimpleNamespace, tmp_path: Path) -> None:
    words = ["generate", str(made.run), "--prompt", NAME, "--max-new-tokens", "25"]
    with (tmp_path / "out").open("wb") as file:
        subprocess.run([sys.executable, "-m", "gptsmith", *words], stdout=file, check=True)
    text = gptsmith.load(made.run).generate(NAME, max_new_tokens=25)
    assert (tmp_path / "out").read_bytes() == f"{NAME}{text}\n".encode()
    assert text != visible(text)


def test_piped_chat(made: SimpleNamespace) -> None:
    loaded = gptsmith.load(made.run)
    replies = {
        seed: loaded.chat("abc", seed=seed, temperature=0.6, max_new_tokens=20)
        for seed in range(20)
    }
    seed = next(seed for seed, reply in replies.items() if "\x1b" in reply)
    words = ["chat", made.run, "--max-new-tokens", 20, "--seed", seed]
    text = shown(words, piped="abc\n/save /nowhere\x1b[2J/x\n")
    assert text == visible(text)
    assert text.startswith(f"{visible(replies[seed])}\n")
    assert text.endswith("/nowhere\\x1b[2J: no such folder\n")
    exact = subprocess.run(
        [sys.executable, "-m", "gptsmith", *map(str, words)],
        input=b"abc\n",
        stdout=subprocess.PIPE,
        check=True,
    )
    assert exact.stdout == f"{replies[seed]}\n".encode()
    text = shown(["chat", made.angry], piped="a\n")
    assert text == visible(text)
    assert r"no \x1b]0;x\x07" in text


def test_reports(made: SimpleNamespace) -> None:
    evaluate = ["evaluate", made.run, "--data", made.text]
    check(shown(evaluate, [*evaluate, "--compare", made.other]), "perplexity", "lm[b]", "other[b]")
    (made.run / "model.json").write_text(
        (made.run / "model.json").read_text().replace("causal()", "m\\u001b]0;y\\u0007.py:rule")
    )
    (made.run / "digests.json").unlink()
    run = shown(["inspect", made.run])
    check(run, r"acc[b]\x1b]0;x\x07\x9b2J\u202e\x7f\r  0.5")
    assert r"maskm\x1b]0;y\x07.py:rule" in "".join(run.split())
    check(shown(["inspect", made.corpus]), r"corpus [b]\x1b]0;x\x07")
    one = ["classify", made.classes, "abc"]
    check(shown(one, [*one, f"b{NAME}"]), r"ham[b]\x1b]0;x", r"spam[b]\x1b]0;x")


def test_errors(made: SimpleNamespace) -> None:
    recipe = made.folder / f"{visible(NAME, '').replace('/', '')}.yaml"
    recipe.write_text('model:\n  "n\\e]0;x\\a": 1\n')
    typed = made.folder / "typed.yaml"
    typed.write_text('train:\n  steps: "\\e]0;x\\a"\n')
    occupied = made.folder / f"out{NAME}"
    occupied.write_text("")
    commands = [
        [NAME],
        ["finetune", NAME],
        ["generate", made.folder / NAME],
        ["generate", made.run, f"--{NAME}"],
        ["generate", made.run, "--top-k", NAME],
        ["generate", made.run, "--checkpoint", NAME],
        ["generate", made.run, "--prompt", f"{NAME}é"],
        ["generate", made.run, NAME],
        ["pretrain", recipe],
        ["pretrain", typed],
        ["pretrain", "--model.mask", NAME, "--data", made.corpus, "--out", made.folder / "new"],
        ["prepare", made.folder / f"{NAME}.txt", "--out", made.folder / "new"],
        ["prepare", made.text, "--format", NAME],
        ["inspect", made.folder / NAME],
        ["evaluate", made.run, "--tasks", NAME],
        ["evaluate", made.run, "--out", made.folder / NAME],
        ["import", made.folder / NAME, "--out", made.folder / "new"],
        ["export", made.run, "--format", "hf", "--out", occupied],
        ["classify", made.classes, "--file", made.folder / f"{NAME}.csv"],
        ["demo", "--folder", occupied, NAME],
    ]
    text = shown(*commands)
    check(text)
    lines = text.splitlines()
    assert len(lines) == len(commands), text
    for line, (verb, *_) in zip(lines, commands, strict=True):
        assert line.startswith("gptsmith: " if verb == NAME else f"gptsmith {verb}")
        assert r"\x1b" in line
