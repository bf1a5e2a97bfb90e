"""Instructions with answers (Alpaca's format): rows, splits, and examples with masked prompts.

The prompt becomes a chat template in which the instruction is the user's message and the answer the
assistant's. It is stored in the run, so that later questions are encoded as in training.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gptsmith.chat_template.template import ChatTemplate, Message
from gptsmith.data import row_fields
from gptsmith.data.cells import InvalidRowError
from gptsmith.data.columns import HISTORY, quoted, with_known_names
from gptsmith.data.examples import Example, ids_and_labels
from gptsmith.data.options import FileFormat, InstructionColumns, SplitConfig
from gptsmith.data.report import ReadReport
from gptsmith.data.row import Row, check_unicode
from gptsmith.data.rows import read_rows
from gptsmith.data.split import group_prompts, split_by_hash
from gptsmith.data.token_tables import IDS

# Taori et al. 2023, "Stanford Alpaca", PROMPT_DICT in train.py. The line end after the last line is
# added here, so that the tokens of the prompt do not depend on how the answer begins.
_TASK = "Below is an instruction that describes a task{}. "
_ASK = "Write a response that appropriately completes the request."
ALPACA_PROMPT = (
    _TASK.format("")
    + _ASK
    + "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_PAIRED = _TASK.format(", paired with an input that provides further context") + _ASK


@dataclass(frozen=True)
class Instruction:
    """A row of a file. place: where it is, for errors. system: replaces the prompt's opening."""

    instruction: str
    input: str
    output: str
    place: str
    system: str = ""


@dataclass(frozen=True)
class Prompt:
    """The parts of a prompt format. See `parse`."""

    opening: str
    opening_with_input: str
    before: str
    between: str
    after: str

    @classmethod
    def parse(cls, text: str = ALPACA_PROMPT) -> Prompt:
        """From a text with {instruction} and, after it, {input} for rows that have one.

        Without an input, the text between the two is omitted. The text up to the last blank line
        before {instruction} is the opening: it occurs once in a conversation, and a system message
        replaces it; that of the classic prompt mentions the input if there is one. ValueError for a
        text without {instruction}, and for one in which nothing separates question and answer.
        """
        head, has_instruction, rest = text.partition("{instruction}")
        between, has_input, after = rest.partition("{input}")
        if not has_input:
            between, after = "\n", rest
        if not has_instruction or "{instruction}" in rest or "{input}" in head + after:
            raise ValueError(
                f"the prompt {text!r} must contain {{instruction}} once and may contain "
                "{{input}} once after it"
            )
        if not after.strip() or after[-1] in " \t":  # a space would become part of the next word
            raise ValueError(
                f"the prompt {text!r} must end with text that announces the answer, such "
                r"as '\nAnswer:\n', and not with a space"
            )
        if r"\n" in text:
            raise ValueError(
                f"the prompt {text!r} contains a backslash and an n, not a line end: in a shell "
                "write --prompt $'...', in YAML double quotes"
            )
        opening, blank, before = head.rpartition("\n\n")
        with_input = _PAIRED if text == ALPACA_PROMPT else opening
        return cls(opening, with_input, blank + before, between, after)

    def messages(self, row: Instruction) -> list[Message]:
        """The row as a conversation without its answer."""
        user: Message = {"role": "user", "content": row.instruction}
        system = row.system
        if row.input:
            user["content"] += self.between + row.input
            if not system and self.opening_with_input != self.opening:
                system = self.opening_with_input
        return [{"role": "system", "content": system}, user] if system else [user]

    def template(self, eos: str, start: str = "") -> str:
        """The prompt as a Jinja chat template. eos: the text of the token that ends an answer.

        start: what the template begins with (see chat_template.template.opening).

        Texts are quoted with JSON's escapes, which Jinja understands: unquoted they would lose
        leading and trailing white space. The hyphens remove the line ends between the tags.
        """
        opening, before, after, end = (
            json.dumps(text, ensure_ascii=False)
            for text in (self.opening, self.before, self.after, eos)
        )
        return f"""\
{start}{{%- if messages[0].role == "system" %}}
{{{{- messages[0].content }}}}
{{%- else %}}
{{{{- {opening} }}}}
{{%- endif %}}
{{%- for message in messages %}}
{{%- if message.role == "user" %}}
{{{{- {before} }}}}
{{{{- message.content | trim }}}}
{{{{- {after} }}}}
{{%- elif message.role == "assistant" %}}
{{{{- message.content | trim }}}}
{{{{- {end} }}}}
{{%- endif %}}
{{%- endfor %}}
"""


# For models with their own template: nothing is added to the text of the data.
PLAIN = Prompt("", "", "", "\n\n", "")


# --- rows ----------------------------------------------------------------------------------------


def read_instructions(
    path: str | Path,
    columns: InstructionColumns,
    report: ReadReport,
    file_format: FileFormat | None = None,
) -> Iterator[Instruction]:
    """The rows of a file (data/rows.py) that have an instruction and an answer.

    Rows in which either is blank, or whose weight is 0, are skipped and counted. ValueError naming
    the place of a row with a missing or non-text column, or with earlier turns or tools, which
    instruction tuning does not support.
    """
    has_inputs, place = False, ""
    for row in read_rows(path, report, file_format=file_format):
        place = row.place
        has_inputs |= row.values.get(columns.input) is not None
        try:
            instruction = _instruction(row, columns, report)
            is_target = row_fields.target_answers(row.values, [None], [0])
        except InvalidRowError as error:
            raise ValueError(f"{place}: {error}") from None
        if not instruction.instruction.strip():
            report.skipped.add("no instruction", place)
        elif not instruction.output.strip():
            report.skipped.add("no answer", place)
        elif not is_target:
            report.skipped.add("weight 0", place)
        else:
            yield instruction
    if columns.input != InstructionColumns().input and not has_inputs:
        raise ValueError(f"{place}: no row up to here has a column {columns.input!r}")


def _instruction(row: Row, columns: InstructionColumns, report: ReadReport) -> Instruction:
    wanted = (columns.instruction, columns.input, columns.output)
    values = with_known_names(row.values, (*wanted, IDS))
    for what, name in (("instruction", columns.instruction), ("output", columns.output)):
        if name not in values and IDS in values:
            raise InvalidRowError(
                "token ids",
                "these are token ids, not instructions: gptsmith finetune chat trains on them, "
                "with labels",
            )
        if name not in values:
            problem = f"no column {name!r}; choose the {what} from {quoted(row.values)}"
            raise InvalidRowError("no column", f"{problem} with --columns.{what} NAME")
    if row_fields.history(values):
        problem = "it has earlier turns (history): use gptsmith finetune chat"
        raise InvalidRowError("row with history", problem)
    if row_fields.tools_of(values):
        raise InvalidRowError("row with tools", "it has tools, which instructions do not use")
    row_fields.check_no_media(values)
    inputs = row_fields.texts(values, (columns.input,))
    if columns.input == InstructionColumns().input:  # not configured: other context counts too
        inputs |= row_fields.context(values, {*wanted})
    row_fields.report_unused_columns(values, {*wanted, *inputs, *HISTORY}, report)
    instruction = row_fields.cell(values, columns.instruction)
    output = row_fields.cell(values, columns.output)
    named_texts = ((columns.instruction, instruction), (columns.output, output))
    for name, text in (*named_texts, *inputs.items()):
        check_unicode(row, name, text)
    system = row_fields.system_text(values)
    return Instruction(instruction, "\n\n".join(inputs.values()), output, row.place, system)


@dataclass(frozen=True)
class InstructionSplit:
    """Training, validation and test rows, each in the order of the file."""

    train: list[Instruction]
    val: list[Instruction]
    test: list[Instruction]


def split_instructions(rows: Iterable[Instruction], config: SplitConfig) -> InstructionSplit:
    """Split the rows by a hash of their prompts; prompts that differ only in case and white space
    stay together.

    The split depends neither on the order of the file nor on the tokenizer, and when a file grows,
    most prompts stay in their split. ValueError if a configured split gets no prompt.
    """
    rows = list(rows)
    prompts = group_prompts(f"{row.instruction}\n{row.input}" for row in rows)
    n = len(prompts)
    n_test, n_val = (round(share * n) for share in (config.test_fraction, config.val_fraction))
    if not n_val or (config.test_fraction and not n_test) or n_test + n_val >= n:
        raise ValueError(
            f"{n} different prompts give {n_test} for the test, {n_val} for validation and "
            f"{max(0, n - n_test - n_val)} to train on: use more rows, or other shares "
            f"than val_fraction {config.val_fraction} and test_fraction {config.test_fraction}"
        )
    test, val, train = (
        [rows[i] for i in part]
        for part in split_by_hash(prompts, (n_test, n_val), config.split_seed)
    )
    return InstructionSplit(train, val, test)


# --- ids -----------------------------------------------------------------------------------------


def encode_instructions(
    rows: Iterable[Instruction],
    prompt: Prompt,
    template: ChatTemplate,
    T: int,
    report: ReadReport,
    mask_prompt: bool = True,
) -> Iterator[tuple[Instruction, Example]]:
    """Encode each row: the ids of its prompt and its answer, which ends with <|endoftext|>.

    mask_prompt: only the answer and its end token are targets. A row that does not fit into T
    tokens is skipped and counted: if truncated, it would lack its question or its end.
    """
    for row in rows:
        answer: Message = {"role": "assistant", "content": row.output}
        try:
            encoded = template.encode([*prompt.messages(row), answer])
        except ValueError as error:
            raise ValueError(f"{row.place}: {error}") from None
        if len(encoded.ids) > T + 1:  # the last token is a target only
            report.skipped.add(f"longer than the context of {T} tokens", row.place)
            continue
        ids, labels = ids_and_labels(encoded)
        yield row, Example(ids, labels if mask_prompt else ids, row.place)
