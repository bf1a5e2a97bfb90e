"""Part 2 as a student might solve it, with PyTorch alone."""

import argparse
import contextlib
import math

import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel


def create_train_loader(path, batch_size, seed=0):
    rows = pa.ipc.open_file(pa.memory_map(str(path))).read_all()["input_ids"].to_pylist()
    ids = torch.tensor(rows, dtype=torch.long)
    return DataLoader(
        TensorDataset(ids[:, :-1], ids[:, 1:]),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(seed),
    )


def create_val_loader(ids, context_length, batch_size):
    windows = []
    for start in range(0, len(ids) - 1, context_length):
        inputs = list(ids[start : start + context_length])
        targets = list(ids[start + 1 : start + context_length + 1])
        inputs = inputs + [0] * (context_length - len(inputs))
        targets = targets + [-100] * (context_length - len(targets))
        windows.append((torch.tensor(inputs), torch.tensor(targets)))
    return DataLoader(windows, batch_size=batch_size, shuffle=False, drop_last=False)


def validation_loss(model, batches):
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for inputs, targets in batches:
            logits = model(inputs)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            total += float(loss)
            count += int((targets != -100).sum())
    model.train(was_training)
    return total / count


def learning_rate(step, peak, warmup_steps, total_steps, min_ratio=0.1):
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (min_ratio + (1 - min_ratio) * cosine)


def train(
    model,
    batches,
    optimizer,
    *,
    steps,
    accumulation,
    peak,
    warmup_steps,
    max_grad_norm=1.0,
    dtype=torch.float32,
    log=lambda record: None,
):
    model.train()
    for step in range(steps):
        micro_batches = [next(batches) for _ in range(accumulation)]
        count = sum(int((targets != -100).sum()) for _, targets in micro_batches)
        rate = learning_rate(step, peak, warmup_steps, steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        total = 0.0
        for inputs, targets in micro_batches:
            low = dtype != torch.float32
            with torch.autocast("cpu", dtype) if low else contextlib.nullcontext():
                logits = model(inputs)
                logits = logits.flatten(0, 1).float()
                loss = F.cross_entropy(logits, targets.flatten(), reduction="sum")
                loss = loss / count
            loss.backward()
            total += float(loss)
        nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        log({"step": step + 1, "loss": total, "learning_rate": rate})


def parse_arguments(argv):
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--context-length", type=int, default=1024)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    return parser.parse_args(argv)


def create_model(args, vocab_size):
    return GPTModel(
        ModelConfig(
            n_layer=args.layers,
            n_head=args.heads,
            n_embd=args.width,
            context_length=args.context_length,
            vocab_size=vocab_size,
        )
    )


def create_optimizer(model, args):
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.learning_rate)


def save_checkpoint(path, model, optimizer, step):
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    torch.save(state, path)


def load_checkpoint(path, model, optimizer):
    state = torch.load(path)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]
