"""Instructions: the classic prompt, rows and columns, the split, masked examples."""

import random
from pathlib import Path

import numpy as np
import pytest
from data_sets import complete_data
from tables import write

from gptsmith.chat_template.template import ChatTemplate
from gptsmith.data.instructions import (
    ALPACA_PROMPT,
    Instruction,
    InstructionSplit,
    Prompt,
    encode_instructions,
    read_instructions,
    split_instructions,
)
from gptsmith.data.options import InstructionColumns, SplitConfig
from gptsmith.data.report import ReadReport
from gptsmith.tokenizer import SPECIAL_TOKENS, Tokenizer

ROWS = [
    {"instruction": "Name a colour.", "input": "", "output": "Red."},
    {"instruction": "Add the numbers.", "input": "2 and 3", "output": "5"},
    {"instruction": "Spell cat.", "input": "", "output": "c-a-t"},
]
# As in Stanford Alpaca (PROMPT_DICT), with a line end added.
ALONE = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\nName a colour.\n\n### Response:\n"
)
PAIRED = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "Add the numbers.\n\n### Input:\n2 and 3\n\n### Response:\n"
)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return Tokenizer.train_bpe([ALONE, PAIRED, "Red. 5 c-a-t hello there"] * 3, 400)


def row(instruction: str = "Do.", given: str = "", output: str = "Done.") -> Instruction:
    return Instruction(instruction, given, output, "here:1")


def encoded(rows, tokenizer, text=ALPACA_PROMPT, T=512, **options):
    prompt = Prompt.parse(text)
    template = ChatTemplate(prompt.template("<|endoftext|>"), tokenizer)
    template.check_prefix_preserving()
    report = ReadReport()
    found = list(encode_instructions(rows, prompt, template, T, report, **options))
    return found, report


def read(path: Path, **columns: str) -> tuple[list[Instruction], ReadReport]:
    report = ReadReport()
    return list(read_instructions(path, InstructionColumns(**columns), report)), report


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet"])
def test_file_formats(tmp_path, name):
    path = tmp_path / name
    if name == "a.csv":
        cells = "".join(",".join(row.values()) + "\n" for row in ROWS)
        path.write_text("instruction,input,output\n" + cells)
    else:
        write(path, *ROWS)
    rows, report = read(path)
    assert [(r.instruction, r.input, r.output) for r in rows] == [tuple(r.values()) for r in ROWS]
    assert all(r.place.startswith(str(path)) for r in rows)
    assert not report.skipped.total


def test_configured_columns(tmp_path):
    path = write(tmp_path / "qa.jsonl", {"question": "Why?", "answer": "So.", "context": "c"})
    rows, _ = read(path, instruction="question", output="answer")
    assert (rows[0].instruction, rows[0].input, rows[0].output) == ("Why?", "c", "So.")
    rows, _ = read(path, instruction="question", input="context", output="answer")
    assert rows[0].input == "c"


def test_blank_rows_are_counted_with_their_places(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"instruction": "Do.", "output": " \n"},
        {"instruction": "", "input": "x", "output": "y"},
        {"instruction": "Do.", "input": None, "output": None},
        {"instruction": "Do.", "input": " ", "output": "y"},
    )
    rows, report = read(path)
    assert [r.input for r in rows] == [""]
    assert report.lines() == [
        "skipped 3 of 4 records (75.0%)",
        f"skipped, no answer: 2 ({path}:1, {path}:3)",
        f"skipped, no instruction: 1 ({path}:2)",
    ]


@pytest.mark.parametrize(
    ("line", "columns", "says"),
    [
        ('{"question": "a", "output": "b"}', {}, "--columns.instruction NAME"),
        ('{"instruction": "a", "answer": "b"}', {}, "'instruction', 'answer'"),
        ('{"instruction": "a", "output": "b"}', {"output": "reply"}, "no column 'reply'"),
        ('{"instruction": "a", "output": "b"}', {"input": "context"}, "'context'"),
        ('{"instruction": "a", "output": [5]}', {}, "'output' holds a list, not text: [5]"),
        ('{"instruction": "a", "input": {}, "output": {"b": 1}}', {}, "holds a struct, not text"),
        ('{"instruction": "a", "context": ["x"], "output": "b"}', {}, "'context' holds a list"),
        ('{"instruction": "a", "output": "b", "history": [["c", "d"]]}', {}, "finetune chat"),
        ('{"instruction": "a", "output": "b", "tools": [{"name": "c"}]}', {}, "it has tools"),
        ('{"instruction": "a", "output": "b", "weight": 0.5}', {}, "weight 0.5: an answer is"),
        ('{"instruction": "a", "output": "b", "image": "x.png"}', {}, "it has image"),
        ('{"instruction": "a", "output": "\\ud800"}', {}, "not Unicode at character 0"),
        ("[1, 2", {}, "not JSON"),
        ('{"input_ids": [1], "labels": [1]}', {}, "finetune chat trains on them"),
    ],
)
def test_errors_name_the_row(tmp_path, line, columns, says):
    path = tmp_path / "a.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl:1: ") as error:
        read(path, **columns)
    assert says in str(error.value)


def test_cells_that_are_not_text(tmp_path):
    """Numbers are text; null and not-a-number are no text."""
    nan = float("nan")
    path = write(
        tmp_path / "a.jsonl",
        {"instruction": "Add.", "input": 0, "output": 5},
        {"instruction": "Add.", "input": nan, "output": 2.5},
        {"instruction": None, "output": "a"},
        {"instruction": nan, "output": "a"},
        {"instruction": "Add.", "output": nan},
        {"instruction": "Add.", "output": "a", "weight": 0},
    )
    found, report = read(path)
    assert [(r.instruction, r.input, r.output) for r in found] == [
        ("Add.", "0", "5"), ("Add.", "", "2.5"),
    ]  # fmt: skip
    assert report.skipped.counts() == {"no answer": 1, "no instruction": 2, "weight 0": 1}


def test_names_of_columns_in_any_case(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("Instruction,INPUT,Output \nAdd.,2 3,5\n")
    (found,), report = read(path)
    assert (found.instruction, found.input, found.output) == ("Add.", "2 3", "5")
    assert not report.hints


def test_answers_marked_as_undesirable_are_no_targets(tmp_path):
    row = {"instruction": "Name a fruit.", "output": "Granite."}
    rows = [row | {"label": False}, row | {"label": "False"}, row | {"kto_tag": False}]
    good = [row | {"label": True}, row | {"kto_tag": True}, row | {"label": 0, "class": "no"}]
    found, report = read(write(tmp_path / "a.jsonl", *rows, *good))
    assert [int(r.place.rpartition(":")[2]) for r in found] == [4, 5, 6]
    assert report.skipped.counts() == {"weight 0": 3}
    assert list(report.hints) == [
        "answers of which column 'label' is false are not trained on",
        "answers of which column 'kto_tag' is false are not trained on",
        "column 'label' is not used",
        "column 'class' is not used",
    ]


@pytest.mark.parametrize("name", ["cot", "Complex_CoT", "rationale", "reasoning", "explanation"])
def test_reasoning_in_a_column_is_said_to_be_left_out(tmp_path, name):
    path = write(tmp_path / "a.jsonl", ROWS[0] | {name: "Red is one."}, ROWS[0] | {name: None})
    found, report = read(path)
    assert [r.output for r in found] == ["Red."] * 2
    assert list(report.hints) == [
        f"column {name!r} is not used: answers are trained on without this reasoning, unless you "
        "write it into them"
    ]


def test_columns_beside_the_instruction_are_used_or_mentioned(tmp_path, bpe):
    path = write(
        tmp_path / "a.jsonl",
        {"instruction": "Who won?", "context": "Boat 2 won.", "output": "Boat 2.", "id": 7},
        {"instruction": "Who won?", "input": "Boat 3 won.", "output": "Boat 3.", "mood": "calm"},
        {"instruction": "Hi", "system": "Be brief.", "output": "Ho", "history": [], "tools": "[]"},
    )
    found, report = read(path)
    assert [(r.input, r.system) for r in found] == [
        ("Boat 2 won.", ""), ("Boat 3 won.", ""), ("", "Be brief."),
    ]  # fmt: skip
    assert list(report.hints) == ["column 'mood' is not used"]
    texts = [bpe.decode(example.ids) for _, example in encoded(found, bpe)[0]]
    assert "### Input:\nBoat 2 won." in texts[0]
    assert texts[2].startswith("Be brief.\n\n### Instruction:\nHi\n")


# --- split ---------------------------------------------------------------------------------------


def split(rows: list[Instruction], **shares: float) -> InstructionSplit:
    return split_instructions(rows, SplitConfig(**shares))


def test_split_has_exact_shares_of_prompts():
    rows = [row(f"Question {n % 100}", output=f"answer {n}") for n in range(300)]
    parts = split(rows, val_fraction=0.2, test_fraction=0.1)
    assert [len(p) for p in (parts.train, parts.val, parts.test)] == [210, 60, 30]
    prompts = [{r.instruction for r in p} for p in (parts.train, parts.val, parts.test)]
    assert len(set.union(*prompts)) == sum(map(len, prompts)) == 100
    assert sorted(map(rows.index, parts.train)) == list(map(rows.index, parts.train))


def test_split_ignores_case_and_white_space():
    same = [row("Name a  colour. "), row("name a colour."), row("Name a\ncolour.")]
    rows = [row(f"Question {n}") for n in range(9)] + same
    for seed in range(8):
        parts = split(rows, val_fraction=0.3, test_fraction=0.3, split_seed=seed)
        counts = [sum(r in same for r in p) for p in (parts.train, parts.val, parts.test)]
        assert sorted(counts) == [0, 0, 3]


def test_split_depends_on_seed_and_text_alone():
    def tested(rows: list[Instruction], seed: int = 0) -> set[str]:
        parts = split(rows, val_fraction=0.2, test_fraction=0.2, split_seed=seed)
        return {r.instruction for r in parts.test}

    rows = [row(f"Question {n}") for n in range(50)]
    first = tested(rows)
    assert tested(random.Random(1).sample(rows, len(rows))) == first
    assert tested(rows, seed=1) != first
    # when a file grows, most prompts stay in their split
    assert len(tested([*rows, row("another")]) & first) >= 9


def test_split_without_test_rows():
    rows = [row(str(n)) for n in range(10)]
    assert split(rows, val_fraction=0.1, test_fraction=0).test == []


@pytest.mark.parametrize(
    ("rows", "shares"), [(3, {}), (10, {"val_fraction": 0.5, "test_fraction": 0.5}), (0, {})]
)
def test_split_of_too_few_rows(rows, shares):
    with pytest.raises(ValueError, match=f"^{rows} different prompts .* use more rows"):
        split([row(str(n)) for n in range(rows)], **shares)


# --- ids -----------------------------------------------------------------------------------------


def test_classic_prompt_is_that_of_alpaca(bpe):
    rows = [Instruction(*r.values(), "here") for r in ROWS]
    found, _ = encoded(rows, bpe)
    for (kept, example), prompt in zip(found, (ALONE, PAIRED), strict=False):
        assert bpe.decode(example.ids) == f"{prompt}{kept.output}<|endoftext|>"
        assert bpe.decode(example.ids[example.labels != -100]) == f"{kept.output}<|endoftext|>"
        assert example.ids[-1] == example.labels[-1] == bpe.eos_id


@pytest.mark.parametrize("kind", ["bpe", "byte", "gpt2"])
def test_prompt_ids_begin_the_example_and_are_masked(kind, bpe, request):
    """The example begins with the ids of the prompt, and exactly these are masked."""
    if kind == "gpt2":
        tokenizer = Tokenizer.gpt2(request.getfixturevalue("real_data") / "gpt2_bpe")
    else:
        tokenizer = bpe if kind == "bpe" else Tokenizer.byte()
    prompt = Prompt.parse()
    template = ChatTemplate(prompt.template("<|endoftext|>"), tokenizer)
    chance = random.Random(0)
    letters = "abz \n\t#:.'1\u00e9\U0001f600"
    texts = ["x" + "".join(chance.choices(letters, k=chance.randrange(20))) for _ in range(200)]
    rows = [row(a, b, c[1:] + "e") for a, b, c in zip(texts, texts[1:], texts[2:], strict=False)]
    for kept, example in encoded(rows, tokenizer)[0]:
        asked = template.prompt(prompt.messages(kept))
        n = len(asked)
        assert example.ids[:n].tolist() == asked
        assert (example.labels[:n] == -100).all()
        assert (example.labels[n:] == example.ids[n:]).all()
        assert tokenizer.decode(example.ids[n:]) == kept.output.strip() + "<|endoftext|>"
    assert template.stop_ids == (tokenizer.eos_id,)


def test_template_agrees_with_transformers(bpe, tmp_path):
    """transformers renders the same template to the same text, including white space."""
    from transformers import PreTrainedTokenizerFast

    bpe.save(tmp_path / "tokenizer.json")
    rows = [row(" a\n", " b\n", " c\n"), row()]
    for text in (ALPACA_PROMPT, 'Oh.\n\n Q: {instruction} \n\n"{input}"\n\u00e9\U0001f600:\n'):
        prompt = Prompt.parse(text)
        stock = PreTrainedTokenizerFast(
            tokenizer_file=str(tmp_path / "tokenizer.json"),
            chat_template=prompt.template("<|endoftext|>"),
        )
        for kept, example in encoded(rows, bpe, text)[0]:
            answer = {"role": "assistant", "content": kept.output}
            messages = [*prompt.messages(kept), answer]
            assert stock.apply_chat_template(messages, tokenize=False) == bpe.decode(example.ids)
            ids = stock.apply_chat_template(messages, tokenize=True, return_dict=False)
            assert ids == example.ids.tolist()


def test_several_turns(bpe):
    """A chat has the opening once, then alternating questions and answers."""
    template = ChatTemplate(Prompt.parse().template("<|endoftext|>"), bpe)
    turns = [("user", "Hi"), ("assistant", "Ho"), ("user", "What?")]
    text = bpe.decode(template.prompt([{"role": r, "content": c} for r, c in turns]))
    assert text == (
        ALONE.replace("Name a colour.", "Hi") + "Ho<|endoftext|>"
        "\n\n### Instruction:\nWhat?\n\n### Response:\n"
    )


def test_unmasked_prompt(bpe):
    found, _ = encoded([row()], bpe, mask_prompt=False)
    assert (found[0][1].labels == found[0][1].ids).all()


def test_special_tokens_in_the_data_are_plain_text():
    tokenizer = Tokenizer.byte().add_special_tokens(SPECIAL_TOKENS)
    special = set(tokenizer.special_tokens.values())
    for literal in SPECIAL_TOKENS:
        ((_, example),) = encoded([row(literal, f"a{literal}", literal * 2)], tokenizer)[0]
        assert [i for i in example.ids.tolist() if i in special] == [tokenizer.eos_id]
        assert example.ids[-1] == tokenizer.eos_id


def test_rows_that_do_not_fit_are_skipped_not_truncated(bpe):
    rows = [row(), row(output="word " * 100), row(given="word " * 100)]
    ((_, example),) = encoded(rows[:1], bpe)[0]
    n = len(example.ids)
    found, report = encoded(rows, bpe, T=n - 1)
    assert [kept for kept, _ in found] == rows[:1]
    assert report.skipped.counts() == {f"longer than the context of {n - 1} tokens": 1}
    assert encoded(rows[:1], bpe, T=n - 2)[0] == []


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("Do it.\n\nQ: {instruction} ({input})\nA:\n",
         ["Do it.\n\nQ: Add (1 + 2)\nA:\n3", "Do it.\n\nQ: Hi)\nA:\nHo"]),
        ("{instruction}\n=>\n", ["Add\n1 + 2\n=>\n3", "Hi\n=>\nHo"]),
        ("{{ {instruction}{input}{% x\n", ["{{ Add1 + 2{% x\n3", "{{ Hi{% x\nHo"]),
    ],
)  # fmt: skip
def test_custom_prompts(prompt, texts):
    byte = Tokenizer.byte()
    found, _ = encoded([row("Add", "1 + 2", "3"), row("Hi", "", "Ho")], byte, prompt)
    assert [byte.decode(e.ids).removesuffix("<|endoftext|>") for _, e in found] == texts


@pytest.mark.parametrize(
    "text",
    ["Answer this:\n", "{input} {instruction}\n.", "{instruction} {instruction}:",
     "Q: {instruction}", "{instruction} {input} ", "{instruction}\n{input}{input}:",
     "{instruction} A: ", r"Q: {instruction}\nA:"],
)  # fmt: skip
def test_invalid_prompts_are_rejected(text):
    with pytest.raises(ValueError, match=r"^the prompt .* (must contain|must end|contains a)"):
        Prompt.parse(text)


def check_encoded(rows):
    """Every row is encoded or skipped with a reason, and only its answer is a target."""
    byte = Tokenizer.byte()
    found, report = encoded(rows, byte, T=1024)
    assert len(found) + report.skipped.total == len(rows)
    for kept, example in found:
        scored = example.ids[example.labels != -100]
        assert byte.decode(scored) == kept.output + "<|endoftext|>"
        assert example.ids.dtype == np.int32


def test_real_instructions(real_data):
    rows, report = read(real_data / "instruction_data" / "instruction-data.json")
    assert len(rows) == 60
    assert not report.skipped.total
    assert 0 < sum(bool(row.input) for row in rows) < 60
    parts = split(rows)
    assert [len(p) for p in (parts.train, parts.val, parts.test)] == [54, 3, 3]
    check_encoded(rows)


def test_alpaca():
    """All 52,002 rows: 28 have no answer, and the shares are exact."""
    name = "alpaca/alpaca_data.json"
    rows, report = read(complete_data({name: 22_773_992}) / name)
    assert len(rows) == 51_974
    assert report.skipped.counts() == {"no answer": 28}
    parts = split(rows)
    assert [len(p) for p in (parts.train, parts.val, parts.test)] == [46_776, 2_599, 2_599]
    check_encoded(parts.test[:200])
