"""Configuration of data: how files are read, which columns are used, how data sets are split.

Imports neither torch nor pyarrow, so that `--help` and configuration errors are immediate.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from gptsmith.config import Section

OnError = Literal["stop", "skip"]
Labels = Literal["auto", "shifted", "unshifted"]


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str | Path) else value


Paths = Annotated[tuple[Path, ...], BeforeValidator(_listed), Field(min_length=1)]
"""Paths, of which one may be written without a list, as in runs of earlier versions."""


class FileFormat(Section):
    """How text files and tables are decoded and parsed, where that is not detected."""

    encoding: str | None = None
    """Encoding of text, .csv, .tsv and .jsonl files: cp1251, shift_jis ... (default: UTF-8, UTF-16
    or cp1252 is detected, and reported)."""
    delimiter: str | None = None
    """Delimiter of the fields of a .csv, or tab (default: one of , ; | and tab is detected, and
    reported)."""

    @field_validator("encoding")
    @classmethod
    def _check_encoding(cls, value: str | None) -> str | None:
        try:
            b"a".decode(value or "utf-8", "surrogateescape")
        except (LookupError, ValueError):
            raise ValueError("should be an encoding that Python knows, such as cp1251") from None
        return value

    @field_validator("delimiter")
    @classmethod
    def _check_delimiter(cls, value: str | None) -> str | None:
        value = "\t" if value in ("tab", "\\t") else value
        if value is not None and (len(value) != 1 or value in '\r\n"\0'):
            raise ValueError("should be one character, such as ; or | or tab")
        return value


class ReadOptions(FileFormat):
    """How files of documents are read."""

    text_column: str | None = None
    """Column of the text in tables and .jsonl files, if it is not obvious."""
    document_separator: str | None = Field(None, min_length=1)
    """Text between the documents of a text file; without it a file is one document."""

    @field_validator("document_separator")
    @classmethod
    def _read_escapes(cls, value: str | None) -> str | None:
        return value and value.replace("\\n", "\n").replace("\\t", "\t")


class MessageFormat(FileFormat):
    """How messages of conversations are read."""

    user_role: str | None = None
    """Name of the user in the messages, if it is not a common one (user, human ...)."""
    assistant_role: str | None = None
    """Name of the assistant, whose messages are the training targets."""
    role_key: str | None = None
    """Field of a message that says who speaks (role, from, speaker ...)."""
    text_key: str | None = None
    """Field of a message that holds its text (content, value, text)."""
    on_error: OnError = "stop"
    """On a row that is not a conversation: stop with an error, or skip and count it."""

    @model_validator(mode="after")
    def _check_roles(self) -> MessageFormat:
        if self.user_role is not None and self.user_role == self.assistant_role:
            raise ValueError("--user-role and --assistant-role are the same: give two names")
        return self


class ChatFiles(MessageFormat):
    """How files of conversations are read."""

    messages_column: str | None = None
    """Column of the messages, if it does not have a common name."""
    prompt_column: str | None = None
    """Column of the questions, in a table of questions and answers."""
    response_column: str | None = None
    """Column of the answers."""
    windows: bool = True
    """Divide conversations that are longer than a row into windows of whole turns, so that every
    answer is trained on; otherwise only the beginning of such a conversation is used."""
    labels: Labels = "auto"
    """Labels of tables of token ids: unshifted (label i is the id at i) or shifted."""

    @model_validator(mode="after")
    def _check_columns(self) -> Self:
        return self.check_columns()

    def check_columns(self) -> Self:
        """ValueError for options that exclude or need each other."""
        if (self.prompt_column is None) != (self.response_column is None):
            raise ValueError("--prompt-column and --response-column belong together: give both")
        if self.messages_column is not None and self.prompt_column is not None:
            raise ValueError("--messages-column and --prompt-column exclude each other: give one")
        return self


class PreferenceFiles(MessageFormat):
    """How files of preferences are read."""

    prompt_column: str | None = None
    """Column of the questions, if it does not have a common name."""
    chosen_column: str | None = None
    """Column of the better answers, if it does not have a common name (chosen ...)."""
    rejected_column: str | None = None
    """Column of the worse answers."""
    scores: bool = True
    """Let columns of scores (score_chosen and score_rejected ...) decide: pairs with equal scores
    are left out, those whose rejected answer has the better one are swapped."""

    @model_validator(mode="after")
    def _check_answers(self) -> PreferenceFiles:
        if (self.chosen_column is None) != (self.rejected_column is None):
            raise ValueError("--chosen-column and --rejected-column belong together: give both")
        return self


class PromptFiles(MessageFormat):
    """How files of prompts are read."""

    prompt_column: str | None = None
    """Column of the prompts, texts or messages, if it does not have a common name."""
    answer_column: str | None = None
    """Column of the expected answers, if it does not have a common name."""
    assistant_role: str | None = None
    """Name of the assistant."""
    on_error: OnError = "stop"
    """On a row that is not a prompt: stop with an error, or skip and count it."""


class InstructionColumns(Section):
    """Names of the columns in the file."""

    instruction: str = "instruction"
    """The instruction."""
    input: str = "input"
    """What the instruction is about; a row may have none."""
    output: str = "output"
    """The answer."""


class SplitConfig(Section):
    """Rows held out from training. Rows with the same prompt are always in the same split."""

    val_fraction: float = Field(0.05, gt=0, lt=1)
    """Share of the prompts for the validation loss during training."""
    test_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of the prompts to answer after training."""
    split_seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the split."""


class LabelledFiles(FileFormat):
    """How files of labelled texts are read."""

    text_column: str | None = None
    """Column of the text in a table, if it is not obvious."""
    label_column: str | None = None
    """Column of the label, if it is not obvious."""


class LabelledConfig(LabelledFiles):
    """Where labelled texts are, and how they are split."""

    data: Paths
    """Table (csv, tsv, json, jsonl, parquet, arrow), lines of a label and a text (`label<TAB>text`,
    `+1 text`, `DESC:manner text`), or a folder with a sub-folder of .txt files per label.
    Repeatable."""
    val: Path | None = None
    """Texts for validation (default: a share of `data`)."""
    test: Path | None = None
    """Texts for the final test (default: a share of `data`)."""
    val_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of each label for validation, without `val`."""
    test_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of each label for the test, without `test`."""
    split_seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the split and of balancing."""
    balance: bool = False
    """Train on the same number of texts per label, that of the rarest one. Validation and test keep
    the real proportions, so that their accuracy is what to expect in use."""
    deduplicate: bool = False
    """Keep each text once. Otherwise copies stay, but all of them in one split."""
    on_error: OnError = "stop"
    """On a row without text or label: stop with an error, or skip and count it."""

    @model_validator(mode="after")
    def _check_fractions(self) -> LabelledConfig:
        val = 0.0 if self.val else self.val_fraction
        test = 0.0 if self.test else self.test_fraction
        if val + test >= 1:
            raise ValueError(f"val_fraction {val} and test_fraction {test} leave nothing to train")
        return self


class PrepareConfig(FileFormat):
    """Turn text into a tokenizer and token shards. `--format chat` turns conversations into token
    ids and labels instead, with options of its own."""

    sources: tuple[str, ...] = Field(min_length=1)
    """Corpora by name (pydocs, pycode, shakespeare, wikitext-2, wikipedia, openwebtext,
    fineweb-edu), tables (.json .jsonl .csv .tsv, also .gz, .parquet .arrow), text files of any
    name, token ids of nanoGPT and llm.c (.bin) and of datatrove (.ds), folders and patterns of
    them, or data sets of the Hub as OWNER/NAME[:CONFIG[:SPLIT]]. `a|b` takes b where a is not
    available."""
    out: Path
    """Folder of the corpus."""
    tokenizer: str = "gpt2"
    """gpt2, bpe (trained on the training documents), char, byte, or a tokenizer.json or the
    folder of a run, corpus or model that holds one."""
    eos_token: tuple[str, ...] = ()
    """Token that ends a text, if the files next to a tokenizer.json do not name it. Repeatable."""
    vocab_size: int | None = Field(None, ge=257, le=1_000_000)
    """Vocabulary size of --tokenizer bpe (default: 8192)."""
    val: str | None = None
    """A source of validation documents; all others are then for training."""
    val_fraction: float = Field(0.1, gt=0, lt=1)
    """Share for validation if the sources have no validation split: the last characters of a single
    document, or the documents with the lowest hashes."""
    text_column: str | None = None
    """Column of the text in tables and .jsonl files, where it is not obvious."""
    document_separator: str | None = Field(None, min_length=1)
    r"""Separator of the documents in a text file, for example '<|endoftext|>', or '\n\n' for blank
    lines. Without it a text file is one document."""
    max_documents: int | None = Field(None, ge=1)
    """Stop after this many documents."""
    max_tokens: int | None = Field(None, ge=1)
    """Stop after this many training tokens."""
    deduplicate: bool = False
    """Skip documents that are exact copies of an earlier one (about 100 MB of memory for a million
    documents)."""
    on_error: OnError = "stop"
    """On a line that cannot be read, bytes that are not UTF-8, or an empty document: stop with an
    error, or skip the line or document and count it."""
    shard_tokens: int = Field(100_000_000, ge=1)
    """Tokens per shard file."""
    workers: int | None = Field(None, ge=1)
    """Threads that encode (default: one per core). The result does not depend on it."""
    overwrite: bool = False
    """Replace the corpus in the folder once the new one is complete."""
    tasks: int | None = Field(None, ge=1)
    """Divide the files of the sources among this many processes. The corpus does not depend on the
    number; its shards have unequal lengths."""
    task: int | None = Field(None, ge=0)
    """Prepare the share of this task only, 0 to --tasks - 1, as a job of an array on a cluster
    does. When all have ended, --join makes the corpus."""
    join: bool = False
    """Make the corpus from what the tasks have prepared."""

    @model_validator(mode="after")
    def _check_tasks(self) -> PrepareConfig:
        if self.task is not None and (self.tasks is None or self.task >= self.tasks or self.join):
            raise ValueError(
                f"--task {self.task} is one of --tasks: give --tasks {self.task + 1} or more, and "
                "--join alone at the end"
            )
        if self.tasks is None and not self.join:
            return self
        whole = {
            f"--tokenizer {self.tokenizer}": self.tokenizer in ("bpe", "char"),
            "--deduplicate": self.deduplicate,
            "--max-documents": self.max_documents is not None,
            "--max-tokens": self.max_tokens is not None,
        }
        if wrong := next((name for name, given in whole.items() if given), None):
            remedy = "give fewer files, or omit --tasks"
            if wrong.startswith("--tokenizer"):
                remedy = "prepare a part of the text with it first, and name its folder here"
            elif wrong == "--deduplicate":
                remedy = "remove the duplicates from the files first, or omit --tasks"
            raise ValueError(f"{wrong} depends on all documents, which no task sees: {remedy}")
        return self
