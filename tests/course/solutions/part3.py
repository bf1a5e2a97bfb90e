"""Part 3 as a student might solve it."""

import pyarrow as pa
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

IGNORE_INDEX = -100


def encode_conversation(messages, tokenizer):
    ids, labels = [], []
    end = tokenizer.special_tokens["<|end|>"]
    for message in messages:
        role = tokenizer.special_tokens[f"<|{message['role']}|>"]
        content = tokenizer.encode(message["content"])
        tokens = [role, *content, end]
        ids += tokens
        if message["role"] == "assistant":
            labels += tokens
        else:
            labels += [IGNORE_INDEX] * len(tokens)
    return ids, labels


def collate(examples, pad_id):
    longest = max(len(ids) for ids, _ in examples) - 1
    inputs = torch.full((len(examples), longest), pad_id)
    targets = torch.full((len(examples), longest), IGNORE_INDEX)
    for row, (ids, labels) in enumerate(examples):
        inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        targets[row, : len(ids) - 1] = torch.tensor(labels[1:])
    return inputs, targets


def generate_response(model, tokenizer, text, max_new_tokens, context_length):
    messages = [{"role": "user", "content": text}]
    return generate_multi_turn_response(model, tokenizer, messages, max_new_tokens, context_length)


@torch.no_grad()
def generate_multi_turn_response(model, tokenizer, messages, max_new_tokens, context_length):
    model.eval()
    prompt, _ = encode_conversation(messages, tokenizer)
    prompt = [*prompt, tokenizer.special_tokens["<|assistant|>"]]
    answer = []
    while len(answer) < max_new_tokens and len(prompt) + len(answer) < context_length:
        logits = model(torch.tensor([prompt + answer]))
        token = int(logits[0, -1].argmax())
        if token == tokenizer.special_tokens["<|end|>"]:
            break
        answer.append(token)
    return tokenizer.decode(answer)


def validation_loss(model, batches):
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for inputs, targets in batches:
            logits = model(inputs)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            total += float(loss)
            count += int((targets != IGNORE_INDEX).sum())
    model.train(was_training)
    return total / count


def shorten(ids, labels, max_length, end):
    fitting = [i + 1 for i, label in enumerate(labels[:max_length]) if label == end]
    last = fitting[-1] if fitting else 0
    return ids[:last], labels[:last]


class ConversationDataset(Dataset):
    def __init__(self, conversations, tokenizer, max_length):
        self.tokenizer, self.max_length = tokenizer, max_length
        self.conversations = [c for c in conversations if self.encode(c)[0]]

    def encode(self, conversation):
        ids, labels = encode_conversation(conversation, self.tokenizer)
        return shorten(ids, labels, self.max_length, self.tokenizer.special_tokens["<|end|>"])

    def __len__(self):
        return len(self.conversations)

    def __getitem__(self, index):
        return self.encode(self.conversations[index])


class ArrowDataset(Dataset):
    def __init__(self, path):
        self.table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()

    def __len__(self):
        return len(self.table)

    def __getitem__(self, index):
        return self.table["input_ids"][index].as_py(), self.table["labels"][index].as_py()


def create_tuning_loader(dataset, batch_size, pad_id, shuffle=True, seed=0):
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        collate_fn=lambda examples: collate(examples, pad_id),
        generator=torch.Generator().manual_seed(seed),
    )
