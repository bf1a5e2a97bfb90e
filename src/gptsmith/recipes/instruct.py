"""Fine-tune a model on instructions, and save its answers to held-out instructions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from gptsmith import files
from gptsmith.chat_template.template import ChatTemplate, opening
from gptsmith.console import Console
from gptsmith.data.examples import Example, Examples
from gptsmith.data.instructions import (
    ALPACA_PROMPT,
    PLAIN,
    Instruction,
    Prompt,
    encode_instructions,
    read_instructions,
    split_instructions,
)
from gptsmith.data.order import evenly_spaced
from gptsmith.data.report import ReadReport
from gptsmith.generate.chat import Chat
from gptsmith.generate.options import SamplingConfig
from gptsmith.recipes import finetune
from gptsmith.recipes.finetune import SFTData
from gptsmith.recipes.options import InstructConfig
from gptsmith.recipes.plan import Note
from gptsmith.recipes.report import number, write_report
from gptsmith.run import Run, digests
from gptsmith.tokenizer import Tokenizer
from gptsmith.train import distributed
from gptsmith.train.monitor import read_events

RESPONSES = "responses.json"
NUM_PROMPTS = 3  # validation instructions to answer at each evaluation
NUM_REPORTED = 5  # answers in the report

Row = TypeVar("Row")


def instruct(config: InstructConfig, started: float | None = None) -> int:
    """`gptsmith finetune instruct`; returns the exit code, 0 or loop.STOPPED."""
    base = finetune.base_run(config)
    prepared = finetune.prepare(config, base)
    prompt, template = choose_prompt(config.prompt, base.template, prepared.tokenizer)
    T = finetune.row_length(config.context_length, prepared)
    data, test = load(config, prompt, template, T)
    code = finetune.train_on_examples(
        config, prepared, template, T, data,
        fixed=("mask_prompt", "split_seed", "val_fraction", "test_fraction"), started=started,
    )  # fmt: skip
    if code == 0 and test and distributed.rank() == 0:
        with distributed.alone():
            answer_test_instructions(config.out, prompt, test, config.response_tokens)
    return code


def choose_prompt(
    text: str | None, model_template: str | None, tokenizer: Tokenizer
) -> tuple[Prompt, ChatTemplate]:
    """How rows become messages, and how messages become ids.

    text: --prompt. ValueError if the tokens of the prompt would depend on the answer.
    """
    eos = {i: name for name, i in tokenizer.special_tokens.items()}.get(tokenizer.eos_id)
    if eos is None:
        raise ValueError(
            f"{tokenizer.decode([tokenizer.eos_id])!r} ends a text and is no special token: import "
            "the model again with --eos-token NAME"
        )
    prompt = Prompt.parse(text or ALPACA_PROMPT)
    source = prompt.template(eos, opening(tokenizer))
    if text is None and model_template not in (None, source):
        prompt, source = PLAIN, str(model_template)
    template = ChatTemplate(source, tokenizer)
    template.check_prefix_preserving()
    return prompt, template


def load(
    config: InstructConfig, prompt: Prompt, template: ChatTemplate, T: int
) -> tuple[SFTData, list[Instruction]]:
    """The examples, and the test instructions to answer after training.

    The notes count every skipped row.
    """
    report = ReadReport()
    found = (read_instructions(path, config.columns, report, config) for path in config.data)
    rows = list(chain.from_iterable(found))
    data = " ".join(map(str, config.data))
    skipped = [f"skipped, {kind}: {n:,}" for kind, n in report.skipped.counts().items()]
    if not rows:
        raise ValueError("; ".join([f"{data}: no rows left for training", *skipped]))
    try:
        parts = split_instructions(rows, config)
    except ValueError as error:
        raise ValueError("; ".join([*skipped, str(error)])) from None

    def encode(rows: list[Instruction], mask: bool = True) -> tuple[Examples, list[Instruction]]:
        kept: list[Instruction] = []

        def examples() -> Iterator[Example]:
            for row, example in encode_instructions(rows, prompt, template, T, report, mask):
                kept.append(row)
                yield example

        return Examples(examples()), kept

    train, _ = encode(parts.train, config.mask_prompt)
    val, val_rows = encode(parts.val)
    test, test_rows = encode(parts.test)
    if not len(train) or not len(val):
        raise ValueError(f"{data}: no rows left for training: {'; '.join(report.lines())}")
    share = train.targets / train.tokens
    sizes = (
        f"{len(train):,} training instructions of {train.tokens:,} tokens, {share:.0%} of them "
        f"targets; {len(val):,} for validation, {len(test):,} for the test"
    )
    notes = [Note("data", text) for text in (*report.lines(), *report.hints, sizes)]
    prompts = [template.prompt(prompt.messages(row)) for row in _evenly(val_rows, NUM_PROMPTS)]
    return SFTData(train, val, prompts, notes), _evenly(test_rows, config.responses)


def _evenly(rows: list[Row], count: int) -> list[Row]:
    """At most `count` rows, evenly spaced."""
    return [rows[i] for i in evenly_spaced(len(rows), count)]


def answer_test_instructions(
    path: Path, prompt: Prompt, rows: Sequence[Instruction], max_new_tokens: int
) -> None:
    """Answer the test instructions with the final weights; write responses.json and the report."""
    with Run.open(path).lock() as run:
        template = run.chat_template
        assert template is not None
        model = run.load_model(device=run.config["train"]["device"], trust_code=True)
        chat = Chat(model, run.tokenizer, template)
        greedy = SamplingConfig(max_new_tokens=max_new_tokens, temperature=0)
        console = Console(stderr=True)
        prompts = [template.prompt(prompt.messages(row)) for row in rows]
        with console.status("answering the test instructions"):
            replies = chat.reply_all(prompts, greedy)
        responses = [
            {
                "instruction": row.instruction,
                "input": row.input,
                "output": row.output,
                **({"system": row.system} if row.system else {}),
                "response": reply.text,
                "stopped": reply.finish_reason == "stop",
            }
            for row, reply in zip(rows, replies, strict=True)
        ]
        digests.write(run.path, {RESPONSES: files.json_bytes(responses)})
        write_report(run, instruct_section(run))
        console.print(_summary(run, responses), soft_wrap=True)


def instruct_section(run: Run) -> list[str]:
    """Lines of the report (Markdown): the result of training, and answers with their references."""
    responses = files.read_json(run.path / RESPONSES)
    lines = ["## Answers to test instructions", "", _summary(run, responses), ""]
    for row in _evenly(responses, NUM_REPORTED):
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
        f"{stopped} of {count} answers to test instructions ended with the stop token "
        f"({stopped / count:.0%}); all are in {RESPONSES}."
    )
