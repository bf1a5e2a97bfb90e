"""Rows of instructions, the prompt of Alpaca around them, and their examples."""

from typing import Any

from gptsmith.chat_template.template import ChatTemplate
from gptsmith.data.examples import Example
from gptsmith.data.instructions import ALPACA_PROMPT, Instruction, Prompt, encode_instructions
from gptsmith.data.report import ReadReport
from gptsmith.tokenizer import Tokenizer

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

BPE = Tokenizer.train_bpe([ALONE, PAIRED, "Red. 5 c-a-t hello there"] * 3, 400)


def row(instruction: str = "Do.", given: str = "", output: str = "Done.") -> Instruction:
    return Instruction(instruction, given, output, "here:1")


def encoded(
    rows: list[Instruction],
    tokenizer: Tokenizer,
    text: str = ALPACA_PROMPT,
    T: int = 512,
    **options: Any,
) -> tuple[list[tuple[Instruction, Example]], ReadReport]:
    prompt = Prompt.parse(text)
    template = ChatTemplate(prompt.template("<|endoftext|>"), tokenizer)
    template.check_prefix_preserving()
    report = ReadReport()
    found = list(encode_instructions(rows, prompt, template, T, report, **options))
    return found, report
