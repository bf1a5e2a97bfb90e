"""Part 4 as a student might solve it, with the data set and the loader of part 3."""

import json

import torch
import torch.nn.functional as F
from course.reference.part3 import ConversationDataset, create_tuning_loader
from torch import nn

import gptsmith

IGNORE_INDEX = -100
SPECIAL_TOKENS = ("<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")


def create_loaders(path, tokenizer, max_length, batch_size, val_fraction=0.05, seed=0):
    with open(path, encoding="utf-8") as file:
        chats = [json.loads(line)["messages"] for line in file]
    chance = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(chats), generator=chance).tolist()
    count = max(1, round(val_fraction * len(chats)))
    val = ConversationDataset([chats[i] for i in order[:count]], tokenizer, max_length)
    train = ConversationDataset([chats[i] for i in order[count:]], tokenizer, max_length)
    pad_id = tokenizer.special_tokens["<|pad|>"]
    return (
        create_tuning_loader(train, batch_size, pad_id, shuffle=True, seed=seed),
        create_tuning_loader(val, batch_size, pad_id, shuffle=False),
    )


def batch_loss(model, inputs, targets, dtype=torch.float32):
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        logits = model(inputs)
        scores = logits.flatten(0, 1).float()
        loss = F.cross_entropy(scores, targets.flatten(), reduction="sum")
    count = int((targets != IGNORE_INDEX).sum())
    return loss, count


def tuning_step(model, batches, optimizer, rate, max_grad_norm=1.0):
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    count = max(1, sum(int((targets != IGNORE_INDEX).sum()) for _, targets in batches))
    total = 0.0
    for inputs, targets in batches:
        loss, _ = batch_loss(model, inputs, targets)
        (loss / count).backward()
        total += loss.item()
    nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    return total / count


def load_pretrained(run):
    base = gptsmith.load(run, device="cpu")
    tokenizer = base.tokenizer.add_special_tokens(SPECIAL_TOKENS)
    weights = base.model.state_dict()
    table = weights["embedding.token.weight"]
    new = tokenizer.vocab_size - len(table)
    weights["embedding.token.weight"] = torch.cat([table, table.mean(0).expand(new, -1)])
    config = base.model.config.change(vocab_size=tokenizer.vocab_size)
    larger = gptsmith.GPTModel(config)
    larger.load_state_dict(weights)
    return larger.train(), tokenizer
