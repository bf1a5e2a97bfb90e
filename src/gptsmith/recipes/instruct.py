"""Instruction tuning: a trained model and instructions with answers in, a model that follows them
out, and its answers to instructions that it has not seen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field
from rich.console import Console
from rich.progress import track

from gptsmith import files
from gptsmith.chat_template import ChatTemplate
from gptsmith.data.examples import Example, Examples
from gptsmith.data.instructions import (
    CLASSIC,
    PLAIN,
    Instruction,
    Prompt,
    encode_instructions,
    read_instructions,
    split,
)
from gptsmith.data.options import InstructionColumns, SplitConfig
from gptsmith.data.report import ReadReport
from gptsmith.generate.chat import Chat
from gptsmith.generate.engine import MAX_BATCH_SIZE
from gptsmith.generate.options import SamplingConfig
from gptsmith.recipes import finetune, options, sft
from gptsmith.recipes.report import number, write_report
from gptsmith.recipes.sft import AnswersConfig
from gptsmith.run import Run
from gptsmith.tokenizer import Tokenizer
from gptsmith.train.monitor import read_events

RESPONSES = "responses.json"
SHOWN = 3  # validation instructions answered at each evaluation
REPORTED = 5  # test instructions whose answers are in the report


class InstructConfig(AnswersConfig, SplitConfig):
    """Tune a model on instructions and their answers."""

    data: Path
    """Rows with instruction, output and perhaps input: .json, .jsonl, .csv, .parquet ...; a folder
    or a pattern for several files."""
    columns: InstructionColumns = InstructionColumns()
    prompt: str | None = None
    r"""How a question is put: a text with {instruction} and {input}, such as (in a shell)
    $'Q: {instruction}\n{input}\nA:\n' (default: the template of a model that has one, else the
    classic Alpaca prompt)."""
    mask_prompt: bool = True
    """Learn the answers only; else the questions too. Validation always scores the answers."""
    responses: int = Field(100, ge=0)
    """Test instructions that are answered after training, for judging (responses.json)."""
    response_tokens: int = Field(256, ge=1)
    """Longest answer."""


def main(argv: Sequence[str], started: float | None = None) -> int:
    """`gptsmith finetune instruct [RECIPE.yaml] --from RUN --data FILE --out RUN2`."""
    return options.command("finetune instruct", InstructConfig, instruct, argv, started)


def instruct(config: InstructConfig, started: float | None = None) -> int:
    """Tune as the config says; returns the exit code, 0 or loop.STOPPED."""
    source = finetune.origin(config)
    begin = finetune.start(config, source)
    prompt, template = choose_prompt(config.prompt, source.template, begin.tokenizer)
    T = finetune.row_length(config.context_length, begin)
    data = load(config, prompt, template, T)
    asked = [template.prompt(prompt.messages(row)) for row in data.shown]
    code = sft.tune(
        config, source, begin, template, T, data.train, data.val, asked, data.notes,
        fixed=("mask_prompt", "split_seed", "val_fraction", "test_fraction"), started=started,
    )  # fmt: skip
    if code == 0 and data.test:
        respond(config, prompt, data.test)
    return code


def choose_prompt(
    text: str | None, own: str | None, tokenizer: Tokenizer
) -> tuple[Prompt, ChatTemplate]:
    """How rows become messages, and messages ids. text: what the user wants; own: the template
    that the model has.

    ValueError for a prompt of which the answer's first tokens would depend.
    """
    eos = {i: name for name, i in tokenizer.special_tokens.items()}[tokenizer.eos_id]
    prompt = Prompt.parse(text or CLASSIC)
    source = prompt.template(eos)
    if text is None and own not in (None, source):
        prompt, source = PLAIN, str(own)
    template = ChatTemplate(source, tokenizer)
    template.check_prefix_preserving()
    return prompt, template


@dataclass(frozen=True)
class Data:
    train: Examples
    val: Examples
    shown: list[Instruction]  # of validation
    test: list[Instruction]  # to be answered
    notes: list[str]


def load(config: InstructConfig, prompt: Prompt, template: ChatTemplate, T: int) -> Data:
    """Read, split and encode; every row that is not used is told of in the notes."""
    report = ReadReport()
    parts = split(read_instructions(config.data, config.columns, report), config)

    def encode(rows: list[Instruction], mask: bool = True) -> tuple[Examples, list[Instruction]]:
        kept: list[Instruction] = []

        def examples() -> Iterator[Example]:
            for row, example in encode_instructions(rows, prompt, template, T, report, mask):
                kept.append(row)
                yield example

        return Examples(examples()), kept

    train, _ = encode(parts.train, config.mask_prompt)
    val, shown = encode(parts.val)
    test, asked = encode(parts.test)
    if not len(train) or not len(val):
        raise ValueError(f"{config.data}: {'; '.join(report.lines())}: nothing is left to train")
    share = train.targets / train.tokens
    notes = [
        f"data: {len(train):,} instructions of {train.tokens:,} tokens to train on, {share:.0%} of "
        f"them scored; {len(val):,} to validate on, {len(test):,} for the test",
        *report.lines(),
    ]
    return Data(train, val, _evenly(shown, SHOWN), _evenly(asked, config.responses), notes)


def _evenly(rows: list[Instruction], count: int) -> list[Instruction]:
    """`count` of the rows, or all, spread over the whole."""
    count = min(count, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def respond(config: InstructConfig, prompt: Prompt, rows: Sequence[Instruction]) -> None:
    """Answer the test instructions with what the run leaves; write responses.json and report."""
    with Run.open(config.out).lock() as run:
        template = run.chat_template
        assert template is not None
        model = run.load_model(device=config.train.device, trust_code=True)
        chat = Chat(model, run.tokenizer, template)
        greedy = SamplingConfig(max_new_tokens=config.response_tokens, temperature=0)
        console = Console(stderr=True, highlight=False)
        responses: list[dict[str, Any]] = []
        starts = track(
            range(0, len(rows), MAX_BATCH_SIZE), "answering the test instructions",
            console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        for start in starts:
            batch = rows[start : start + MAX_BATCH_SIZE]
            asked = [template.prompt(prompt.messages(row)) for row in batch]
            replies = chat.reply_all(asked, greedy)
            responses += [
                {
                    "instruction": row.instruction,
                    "input": row.input,
                    "output": row.output,
                    "response": reply.text,
                    "stopped": reply.finish_reason == "stop",
                }
                for row, reply in zip(batch, replies, strict=True)
            ]
        files.write_json(run.path / RESPONSES, responses)
        write_report(run, instruct_section(run))
        console.print(_summary(run, responses), soft_wrap=True, markup=False)


def instruct_section(run: Run) -> list[str]:
    """Lines of the report (Markdown): what tuning did, and some answers beside their references."""
    responses = files.read_json(run.path / RESPONSES)
    lines = ["## Answers to test instructions", "", _summary(run, responses), ""]
    for n in range(min(REPORTED, len(responses))):
        row = responses[n * len(responses) // min(REPORTED, len(responses))]
        names = ("instruction", "input", "response", "output")
        for name, title in zip(names, ("Instruction", "Input", "Answer", "Reference"), strict=True):
            if row[name]:
                text = row[name].strip() + ("" if name != "response" or row["stopped"] else " ...")
                lines += [f"    {line}" for line in f"{title}: {text}".splitlines()]
        lines += ["", "---", ""]
    return lines[:-2]


def _summary(run: Run, responses: Sequence[Mapping[str, Any]]) -> str:
    events = [e for e in read_events(run.metrics) if e["event"] == "val"]
    before = f"{number(events[0]['val_loss'], '.4f')} -> " if events[0]["step"] == 0 else ""
    stopped, count = sum(row["stopped"] for row in responses), len(responses)
    return (
        f"Validation loss of the answers: {before}{number(events[-1]['val_loss'], '.4f')}. "
        f"{stopped} of {count} answers to test instructions ended by themselves "
        f"({stopped / count:.0%}); all are in {RESPONSES}."
    )
