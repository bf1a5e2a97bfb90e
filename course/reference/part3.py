"""Part 3 by gptsmith's own chat template, rows, replies and evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from course.reference.part2 import validation_loss
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gptsmith.batch import IGNORE_INDEX
from gptsmith.chat_template.template import TEMPLATE, ChatTemplate
from gptsmith.data import examples as stored
from gptsmith.data.chat import ChatCounts, encode_conversations
from gptsmith.data.conversations import Conversation
from gptsmith.data.packing import PaddedRows
from gptsmith.generate.chat import Chat
from gptsmith.generate.options import SamplingConfig
from gptsmith.model.gpt import GPTModel

__all__ = ["validation_loss"]

Message = dict[str, str]
Example = tuple[list[int], list[int]]


def encode_conversation(messages: Sequence[Message], tokenizer: Any) -> Example:
    ids, is_target, _ = ChatTemplate(TEMPLATE, tokenizer).encode(messages)
    labels = [id if learned else IGNORE_INDEX for id, learned in zip(ids, is_target, strict=True)]
    return ids, labels


def as_stored(example: Example, name: str = "") -> stored.Example:
    ids, labels = (np.array(numbers, np.int32) for numbers in example)
    return stored.Example(ids, labels, name)


def collate(examples: Sequence[Example], pad_id: int) -> tuple[Tensor, Tensor]:
    T = max(len(ids) for ids, _ in examples) - 1
    found = stored.Examples(as_stored(example) for example in examples)
    [batch] = PaddedRows(found, T, 0, pad_id, fixed=True).validation(len(examples))
    return batch.inputs, batch.targets


def generate_response(
    model: GPTModel, tokenizer: Any, text: str, max_new_tokens: int, context_length: int
) -> str:
    messages = [{"role": "user", "content": text}]
    return generate_multi_turn_response(model, tokenizer, messages, max_new_tokens, context_length)


def generate_multi_turn_response(
    model: GPTModel,
    tokenizer: Any,
    messages: Sequence[Message],
    max_new_tokens: int,
    context_length: int,
) -> str:
    assert context_length == model.config.context_length
    chat = Chat(model.eval(), tokenizer, ChatTemplate(TEMPLATE, tokenizer))
    prompt = chat.template.truncate(messages, context_length)
    return chat.reply(prompt, SamplingConfig(temperature=0, max_new_tokens=max_new_tokens)).text


class StoredDataset(Dataset[Example]):
    def __init__(self, examples: stored.Examples) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        ids, labels, _ = self.examples[index]
        return ids.tolist(), labels.tolist()


class ConversationDataset(StoredDataset):
    def __init__(
        self, conversations: Sequence[Sequence[Message]], tokenizer: Any, max_length: int
    ) -> None:
        found = (Conversation(list(m), f"row {i}") for i, m in enumerate(conversations))
        counts = ChatCounts(max_length - 1, divide=False)
        template = ChatTemplate(TEMPLATE, tokenizer)
        super().__init__(stored.Examples(encode_conversations(found, template, counts)))


class ArrowDataset(StoredDataset):
    def __init__(self, path: Path) -> None:
        super().__init__(stored.Examples(path))


def create_tuning_loader(
    dataset: Dataset[Example], batch_size: int, pad_id: int, shuffle: bool = True, seed: int = 0
) -> Iterable[tuple[Tensor, Tensor]]:
    return DataLoader(
        dataset, batch_size, shuffle, collate_fn=lambda examples: collate(examples, pad_id),
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
