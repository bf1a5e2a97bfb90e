"""The outputs that the documentation shows are those of its commands."""

import os
import re
import shlex
from pathlib import Path

import pytest
from documented_commands import FEW, LITTLE, Step, command_with, run_steps

from docs import outputs
from docs.difference import difference
from docs.inputs import make_inputs

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def page(folder: Path, block: str) -> Path:
    path = folder / "page.md"
    path.write_text(f"# Page\n\n```console\n{block}\n```\n\nText.\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("name", outputs.PAGES)
def test_no_command_is_wider_than_a_block_of_the_site(name: str) -> None:
    for block in outputs.blocks(DOCS / name):
        for command in outputs.commands(block):
            for line in f"$ {command.text}".splitlines():
                assert len(line) <= 88, line


def test_the_page_of_data_shows_what_its_commands_print(capfd: pytest.CaptureFixture[str]) -> None:
    """The other pages: `make docs-check`."""
    assert outputs.main(["--check", "data.md"]) == 0
    assert not capfd.readouterr().out


def test_outputs_are_written_below_their_commands(tmp_path: Path) -> None:
    red = r"printf '\033[31mred\033[0m %s\n' \
    two"
    path = page(tmp_path, f"$ {red}\nold\n$ true\nold\n$ seq 100\n$ echo {'word ' * 30}")
    outputs.rewrite(path, outputs.Shell(tmp_path))
    first, _, rest = path.read_text().partition("$ true\n")
    assert first == f"# Page\n\n```console\n$ {red}\nred two\n"
    assert rest.startswith("$ seq 100\n1\n2\n")
    assert "\n22\n...\n93\n" in rest
    assert rest.endswith("word\n```\n\nText.\n")
    assert max(map(len, rest.splitlines())) <= max(outputs.WIDTH, len(f"$ echo {'word ' * 30}"))
    assert [c.output for c in outputs.commands(path.read_text().split("```")[1][8:])][:2] == [
        "red two",
        "",
    ]


def test_of_progress_the_first_and_the_last_line_are_shown() -> None:
    printed = "".join(f"step {i}/9 · loss {i}\n" for i in range(10))
    assert outputs.shown(f"a\n{printed}b") == "a\nstep 0/9 · loss 0\n...\nstep 9/9 · loss 9\nb"
    assert difference(outputs.shown(f"a\n{printed}b"), "a\nstep 4/9 · loss 1\nb") is None


def test_another_output_is_named(tmp_path: Path) -> None:
    path = page(tmp_path, "$ echo one; echo two words\none\nthree words\n$ echo 3\n4")
    found = list(outputs.check(path, outputs.Shell(tmp_path)))
    assert found == [
        "page.md: $ echo one; echo two words\n  page:    three words\n  printed: two words"
    ]


@pytest.mark.parametrize(
    ("expected", "printed", "differs"),
    [
        ("12 tokens in 3.4 s", "1,200 tokens in 0.5 ms", False),
        ("with 1 thread", "with 2 threads", False),
        ("with 1 shard", "with 2 threads", True),
        ("step 1: loss 2.0", "step 1 · loss 1.0\nstep 1: loss 3.5", False),
        ("loss 2\nstep 0  3 MB intact", "loss 2\nstep 0 3 MB intact\nstep 9 4 MB intact", False),
        ("┏━━━┓\n┃ 1 ┃", "┏━━━━━┓\n┃ 100 ┃", False),
        ("a long line", "a long\nline", False),
        ("one\n...\nnine ten", "one\ntwo\nthree\nnine\nten", False),
        ("one\n...\nnine ten", "one\ntwo\nthree\nnine\neleven", True),
        ("one\n...\nten", "two\nten", True),
        ("one\n...\nfour\n...\nten", "one\ntwo\nfour\nfive\nten", False),
        ("one\n...\nfour\n...\nten", "one\nfour\nten", False),
        ("one\n...\nfour\n...\nten", "one\nfive\nten", True),
        ("one", "one\ntwo", True),
        ("one\ntwo", "one", True),
    ],
)
def test_words_are_compared(expected: str, printed: str, differs: bool) -> None:
    assert (difference(expected, printed) is not None) == differs


def test_a_command_is_refused_where_its_page_says_so(tmp_path: Path) -> None:
    """Also one whose words are not compared."""
    refused = "gptsmith generate --nothing"
    message = "gptsmith generate: there is no --nothing"
    path = page(tmp_path, f"$ {refused}\n{message}\n$ {refused}\na text")
    shell = outputs.Shell(tmp_path)
    (found,) = outputs.check(path, shell)
    assert found.startswith(f"page.md: $ {refused}\ngptsmith generate: unknown option")
    page(tmp_path, f"$ true\n{message}")
    assert list(outputs.check(path, shell)) == ["page.md: $ true\n"]
    page(tmp_path, f"$ {refused}\na text")
    with pytest.raises(ValueError, match=f"{refused}\ngptsmith generate: unknown option"):
        outputs.rewrite(path, shell)


def test_a_command_that_fails_is_an_error_and_one_that_refuses_is_not(tmp_path: Path) -> None:
    shell = outputs.Shell(tmp_path)
    with pytest.raises(ValueError, match="ended with 3"):
        shell.run("echo broken; exit 3")
    with pytest.raises(ValueError, match="ended with 2"):
        shell.run("ls /nowhere")
    printed, refused = shell.run("gptsmith prepare nowhere.txt --out x")
    assert refused
    assert printed.startswith("gptsmith prepare: ")
    assert shell.run("echo done") == ("done", False)


def test_runs_of_a_demo_are_copied(tmp_path: Path) -> None:
    weights = "runs/demo-chat/model.safetensors"
    for name in ("demo", "demo-chat"):
        (tmp_path / "made" / "runs" / name).mkdir(parents=True)
    (tmp_path / "made" / weights).write_text("weights")
    (tmp_path / "new").mkdir()
    make_inputs(tmp_path / "new", demo=tmp_path / "made")
    (tmp_path / "new" / weights).write_text("others")
    assert (tmp_path / "made" / weights).read_text() == "weights"


def test_pages_run_after_those_that_they_build_on() -> None:
    assert outputs.in_order(["model.md"]) == ["data.md", "pretraining.md", "model.md"]
    assert outputs.in_order(["tuning.md", "data.md"]) == ["data.md", "tuning.md"]


def test_pictures_are_small_and_shown() -> None:
    pictures = list((DOCS / "images").iterdir())
    pages = "".join(p.read_text("utf-8") for p in (*DOCS.glob("*.md"), ROOT / "README.md"))
    assert {p.name for p in pictures} >= set(outputs.PICTURES)
    assert all(f"images/{p.name}" in pages and p.stat().st_size < 80_000 for p in pictures)
    assert sum(p.stat().st_size for p in pictures) < 1_000_000


# What makes the commands of a page small; later words overrule earlier ones.
LESS = {
    "^gptsmith prepare pydocs": "--max-documents 60",
    "^gptsmith pretrain .*--resume": "--train.steps 4",
    "^gptsmith pretrain ": LITTLE,
    "^gptsmith finetune chat .*--data skills": f"{LITTLE} --questions 100",
    "^gptsmith finetune chat ": LITTLE,
    "^gptsmith finetune classify ": FEW,
    "^gptsmith finetune preference ": f"{FEW} --eval.sample-tokens 8 --questions 40",
    "^gptsmith finetune reward ": f"{FEW} --questions 20 --prompts-per-step 4 --val-prompts 4 "
    "--max-new-tokens 8",
    "^gptsmith evaluate .*--tasks skills": "--per-skill 1",
}
# Runs in the place of the demo's.
DEMO = (
    "gptsmith prepare pydocs --tokenizer byte --out data/bytes",
    "gptsmith pretrain --data data/bytes --out demo/runs/demo --model nano "
    "--model.context-length 256",
    "gptsmith finetune chat --from runs/demo --data skills --out demo/runs/demo-chat",
)


@pytest.mark.skipif("GPTSMITH_DOCS" not in os.environ, reason="make docs-check")
def test_the_commands_of_all_pages_work(tmp_path: Path) -> None:
    """Those of gptsmith but for servers, pipes and kills."""
    make_inputs(tmp_path, demo=tmp_path / "nowhere")
    found = [
        command
        for name in outputs.PAGES
        if name != "reliability.md"  # which kills a run
        for block in outputs.blocks(DOCS / name)
        for command in outputs.commands(block)
    ]
    shown = [
        command.line
        for command in found
        if re.match("gptsmith (?!serve)", command.line) and not command.is_refused
    ]
    assert len(shown) >= 20
    words = [shlex.split(command_with(line, LESS)) for line in (*DEMO, *shown)]
    run_steps([Step("gptsmith", arguments) for _, *arguments in words], tmp_path)
