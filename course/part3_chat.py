"""Part 3: conversations, from messages to token ids and back.

    python -m course.check course/part3_chat.py 3.1

`messages` is a list of {"role": "system" | "user" | "assistant", "content": text}. `tokenizer` has
`encode(text)`, `decode(ids)` and `special_tokens`, as the one of exercise 1.15. A conversation is
written as <|role|>content<|end|> for each message, without anything between. Labels are the ids to
learn, at the positions where they are (not shifted), and IGNORE_INDEX everywhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

IGNORE_INDEX = -100

Message = dict[str, str]
Example = tuple[list[int], list[int]]
"""Ids and labels of a conversation, equally long."""


def encode_conversation(messages: Sequence[Message], tokenizer: Any) -> Example:
    """3.1. Ids and labels of a conversation.

    Of each answer, <|assistant|>, the content and the <|end|> after it are learned. All else is
    context: system and user messages with their special tokens. Contents are plain text, whatever
    they spell.
    """
    raise NotImplementedError("exercise 3.1")


def collate(examples: Sequence[Example], pad_id: int) -> tuple[Tensor, Tensor]:
    """3.2. Inputs and targets, (B, T) int64, of B examples; T is the longest one's length less 1.

    Target t of a row is label t + 1 of its example: here, and nowhere else, labels are shifted.
    Shorter rows are padded on the right: inputs with pad_id, targets with IGNORE_INDEX. An id that
    equals pad_id but belongs to the conversation keeps its label.
    """
    raise NotImplementedError("exercise 3.2")


def generate_response(
    model: nn.Module, tokenizer: Any, text: str, max_new_tokens: int, context_length: int
) -> str:
    """3.3. The model's answer to one message of the user, without special tokens."""
    raise NotImplementedError("exercise 3.3")


def generate_multi_turn_response(
    model: nn.Module,
    tokenizer: Any,
    messages: Sequence[Message],
    max_new_tokens: int,
    context_length: int,
) -> str:
    """3.3. The answer to a whole conversation, which ends with a message of the user.

    The prompt is the conversation and <|assistant|>. Each new token is the most probable one.
    The answer ends before <|end|>, after max_new_tokens, or where prompt and answer together have
    context_length tokens. The model is in evaluation mode, and records no gradients.
    """
    raise NotImplementedError("exercise 3.3")


def validation_loss(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """3.4. The mean loss per target over all batches, in nats, as in exercise 2.2: a conversation
    with a long answer counts for more than one with a short answer."""
    raise NotImplementedError("exercise 3.4")


class ConversationDataset(Dataset[Example]):
    """3.5, the slow one: encodes a conversation each time that it is used.

    An example ends with the last answer of its conversation that fits into max_length tokens, so
    that no answer is cut in half. A conversation without such an answer is left out.
    """

    def __init__(
        self, conversations: Sequence[Sequence[Message]], tokenizer: Any, max_length: int
    ) -> None:
        """3.5."""
        raise NotImplementedError("exercise 3.5")

    def __len__(self) -> int:
        raise NotImplementedError("exercise 3.5")

    def __getitem__(self, index: int) -> Example:
        raise NotImplementedError("exercise 3.5")


class ArrowDataset(Dataset[Example]):
    """3.5, the fast one: reads examples from an Arrow IPC file that was made once before.

    The file, as `gptsmith prepare --format chat` writes it, has the columns `input_ids` and
    `labels`, a list of ids for each conversation. Hint: see exercise 2.1.
    """

    def __init__(self, path: Path) -> None:
        """3.5."""
        raise NotImplementedError("exercise 3.5")

    def __len__(self) -> int:
        raise NotImplementedError("exercise 3.5")

    def __getitem__(self, index: int) -> Example:
        raise NotImplementedError("exercise 3.5")


def create_tuning_loader(
    dataset: Dataset[Example], batch_size: int, pad_id: int, shuffle: bool = True, seed: int = 0
) -> Iterable[tuple[Tensor, Tensor]]:
    """3.5. Collated batches of a data set; with shuffle, each epoch has a new order. Every example
    is in one batch of an epoch; the last batch may be smaller."""
    raise NotImplementedError("exercise 3.5")
