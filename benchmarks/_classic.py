"""The classic CPU recipe for tiny Shakespeare by characters: a plain loop, transformers' GPT-2.

benchmarks/convergence.py times this file as a command: python _classic.py CORPUS. So nothing is
imported that the loop does not need.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

STEPS, BATCH, T = 2000, 12, 64


def classic(corpus: Path) -> tuple[float, int]:
    """The final validation loss, and the size of the vocabulary."""
    torch.manual_seed(1337)
    train, val = (
        torch.from_numpy(np.load(corpus / f"{split}-00000.npy").astype(np.int64))
        for split in ("train", "val")
    )
    vocab_size = int(train.max()) + 1
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size,
            n_positions=T,
            n_embd=128,
            n_layer=4,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True
    )
    for step in range(STEPS):
        rate = 1e-3 * (step + 1) / 101
        if step >= 100:
            rate = 1e-4 + 4.5e-4 * (1 + math.cos(math.pi * (step - 100) / (STEPS - 100)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        at = torch.randint(len(train) - T - 1, (BATCH,))
        rows = torch.stack([train[i : i + T + 1] for i in at])
        logits = model(rows[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    n = (len(val) - 1) // T * T
    with torch.no_grad():
        logits = model(val[:n].view(-1, T)).logits
        loss = F.cross_entropy(logits.flatten(0, 1), val[1 : n + 1])
    return float(loss), vocab_size


if __name__ == "__main__":
    print(json.dumps(classic(Path(sys.argv[1]))))
