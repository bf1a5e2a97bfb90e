"""The recipes of docs/cookbook.md are run, in their order and in one folder, with less work."""

import csv
import json
import re
from pathlib import Path

import pytest
from documented_commands import FEW, LITTLE, ROOT, Step, blocks, commands, run_steps, steps
from server_process import serving

from gptsmith import cli
from gptsmith.model.config import ModelConfig
from gptsmith.model.flops import TrainingMemory, block_matrices, training_memory
from gptsmith.train.loss import CHUNK_BYTES

PAGE = (ROOT / "docs/cookbook.md").read_text("utf-8")
BLOCKS = [*blocks(PAGE)]
SERVER = "How does my program talk to it?"
DATA = ROOT / "tests/fixtures/data"

MEASURE_LITTLE = "--eval.tokens 500 --eval.sample-tokens 8"
CHANGES = {
    r"^gptsmith pretrain .*--resume --train.steps": "--train.steps 5 --train.num-threads 1",
    r"^gptsmith pretrain .*--resume": "",
    r"^gptsmith pretrain .*--train.total-batch": f"--model nano {FEW} {MEASURE_LITTLE}",
    r"^gptsmith pretrain": f"--model nano {LITTLE}",
    r"^gptsmith finetune chat .*--data skills": f"{LITTLE} --questions 100",
    r"^gptsmith finetune chat .*--train.batch-size": f"{FEW} {MEASURE_LITTLE}",
    r"^gptsmith finetune (chat|text)": LITTLE,
    r"^gptsmith finetune classify": FEW,
    r"^gptsmith finetune preference": f"{FEW} --eval.sample-tokens 8 --val-fraction 0.2",
    r"^gptsmith finetune reward": f"{FEW} --prompts-per-step 4 --val-prompts 8 --val-fraction 0.2",
}
# In place of OpenAI's files, which would be downloaded: one layer with the same tokenizer.
SMALL_GPT2 = [
    "prepare page.txt --tokenizer DATA/gpt2_bpe --out data/small",
    "pretrain --data data/small --out runs/small --model gpt2 --model.n-layer 1 --model.n-head 2 "
    f"--model.n-embd 32 --model.context-length 256 {LITTLE}",
    "export runs/small --format hf --out 124M",
]


def write_inputs(folder: Path) -> None:
    """What the page says that its reader has."""
    ask = ("Where is my parcel", "When do you open", "What does it cost", "Who are you")
    reply = ("Please tell me its number.", "At nine.", "Ten, with tax.", "I answer questions.")
    turns = [(f"{ask[i % 4]}, {i}?", reply[i % 4]) for i in range(40)]
    text = (DATA / "tinyshakespeare/input.txt").read_text("utf-8")
    (folder / "book.txt").write_text(text[:60_000])
    (folder / "holdout.txt").write_text(text[60_000:66_000])
    (folder / "page.txt").write_text(text[:5_000])
    (folder / "DATA").symlink_to(DATA)
    (folder / "manuals").mkdir()
    for name in ("train", "valid"):
        (folder / f"manuals/{name}.md").write_bytes((DATA / f"wikitext-2/{name}.txt").read_bytes())

    def write_lines(name: str, rows: list[dict]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def messages(a: str, b: str, role: str, text: str, users: str, answers: str) -> list[dict]:
        return [{role: users, text: a}, {role: answers, text: b}]

    write_lines(
        "chats.jsonl",
        [{"messages": messages(a, b, "role", "content", "user", "assistant")} for a, b in turns],
    )
    write_lines(
        "calls.jsonl",
        [{"call": messages(a, b, "who", "said", "caller", "agent")} for a, b in turns],
    )
    write_lines("questions.jsonl", [{"prompt": a, "answer": b} for a, b in turns])
    write_lines(
        "pairs.jsonl",
        [{"prompt": a, "chosen": b, "rejected": "How should I know?"} for a, b in turns],
    )
    teams = [(ask, "abc"[i % 3]) for i, (ask, _) in enumerate(turns)]
    bodies = [(i, f"Caf\xe9 {answer}") for i, (_, answer) in enumerate(turns)]
    tables: dict[str, tuple[str, list[str], list]] = {
        "faq.csv": (",", ["asked", "reply"], turns),
        "tickets.csv": (",", ["message", "team"], teams),
        "new.csv": (",", ["message"], [(ask,) for ask, _ in turns[:5]]),
        "export.csv": (";", ["id", "body"], bodies),
    }
    for name, (delimiter, names, rows) in tables.items():
        with (folder / name).open("w", encoding="cp1252", newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows([names, *rows])


@pytest.fixture(scope="module")
def cooked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder in which all recipes were run but that of the server, and what they printed."""
    folder = tmp_path_factory.mktemp("cookbook")
    write_inputs(folder)
    todo = [Step("gptsmith", command.split()) for command in SMALL_GPT2]
    for block in BLOCKS:
        if block.section != SERVER:
            todo += steps(block, CHANGES)
    return folder, run_steps(todo, folder)


def test_the_recipes_work_in_their_order(cooked: tuple[Path, str]) -> None:
    folder, said = cooked
    assert "The king" in said
    assert "■" in said  # of a mask
    with (folder / "sorted.csv").open() as file:
        assert {row["predicted"] for row in csv.DictReader(file)} <= {*"abc"}
    [events] = [(folder / "moved/book/metrics.jsonl").read_text()]
    assert '"step": 5' in events
    compared = json.loads((folder / "compare.json").read_text())
    assert "paired" in compared["compare"]
    for named in re.findall(r"exported/[\w./-]+", PAGE):
        assert (folder / named).exists(), named


def test_a_program_talks_to_the_server(
    cooked: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [server], [program] = [
        [b for b in BLOCKS if (b.section, b.language) == (SERVER, language)]
        for language in ("bash", "python")
    ]
    [command] = commands(server.text)
    monkeypatch.chdir(cooked[0])
    monkeypatch.setenv("NO_PROXY", "*")
    with serving(*command.split()[2:]) as (_, url):
        exec(program.text.replace("http://127.0.0.1:8000", url), {})
    assert re.search(r"^\['[abc]', '[abc]'\]$", capsys.readouterr().out, re.MULTILINE)


OTHERS = [line for block in BLOCKS if block.language == "sh" for line in commands(block.text)]


@pytest.mark.parametrize("command", [line for line in OTHERS if "gptsmith" in line])
def test_what_cannot_be_run_names_options_and_files_that_exist(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command.partition("gptsmith ")[2].split()
    verb = words[0] if words[0] in cli.VERBS else "pretrain"  # by configs/slurm/pretrain.sbatch
    assert cli.main([verb, "--help"]) == 0
    known = capsys.readouterr().out
    for option in re.findall(r"--[a-z][\w.-]+", " ".join(words)):
        assert re.search(rf"{option}\b", known), option
    for name in re.findall(r"configs/\S+", command):
        assert (ROOT / name).is_file(), name


ROWS = re.findall(r"`([\w.]+)`:\n\n```json\n(.*)\n```", PAGE)


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_rows_are_as_the_page_shows_them(name: str, row: str, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    first = json.loads((tmp_path / name).read_text().splitlines()[0])
    assert shape(json.loads(row)) == shape(first)


def shape(value: object) -> object:
    match value:
        case dict():
            return {key: shape(inner) for key, inner in value.items()}
        case list():
            return [shape(inner) for inner in value]
        case _:
            return type(value)


def test_every_file_of_rows_is_shown() -> None:
    assert {name for name, _ in ROWS} == {*re.findall(r"\w+\.jsonl", PAGE)}


GPT2 = ModelConfig.preset("gpt2")
ADAPTERS = 8 * sum(  # rank times rows and columns of each matrix
    (GPT2.n_embd + rows) * GPT2.n_layer for rows in (3 * GPT2.n_embd, GPT2.n_embd, GPT2.F, GPT2.F)
)


def memory(rows: int, T: int = 1024, **more: object) -> TrainingMemory:
    return training_memory(GPT2, rows, T, autocast="cuda", chunk_bytes=CHUNK_BYTES["cuda"], **more)  # type: ignore[arg-type]


def test_the_table_of_memory_is_computed() -> None:
    lora = dict(trained=ADAPTERS)
    cases = {
        "32 rows of 1,024 tokens": memory(32),
        "8 rows": memory(8),
        "8 rows, `--train.activation-checkpointing`": memory(8, checkpointing=True),
        "8 rows of 256 tokens": memory(8, 256),
        "8 rows, `--lora.rank 8`": memory(8, **lora),
        "1 row, LoRA, `--quantize nf4`, checkpointing": memory(
            1, checkpointing=True, quantize="nf4", **lora
        ),
    }
    for name, found in cases.items():
        columns = (found.weights, found.gradients + found.optimizer, found.activations, found.total)
        cells = " | ".join(f"{size / 2**30:.1f}" for size in columns)
        assert f"| {name} | {cells} |" in PAGE, f"| {name} | {cells} |"
    assert block_matrices(GPT2) > 80e6
