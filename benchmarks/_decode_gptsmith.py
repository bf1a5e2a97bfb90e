"""Our kernels as a contestant of `decode`: WEIGHTS TOKENS PROMPT."""

import sys
import time
from collections.abc import Callable

import torch
from benchmarks._contestant import PROMPT, answer

from gptsmith.kernels.packed_model import PAGE, PackedModel
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel


def prepare(weights: str, tokens: int, prompt: int) -> tuple[Callable[[], list[float]], int]:
    torch.manual_seed(0)
    packed = PackedModel(GPTModel(ModelConfig.preset("gpt2")).eval(), weights)

    def decode(rows: int) -> float:
        # random number, temperature, top_p, min_p, top_k
        greedy = [[value] * rows for value in (0, 0, 1, 0, 0)]
        n = -(-(len(PROMPT) + tokens) // PAGE)
        pages, table = packed.pages(rows * n), torch.arange(rows * n, dtype=torch.int32)
        table = table.view(rows, n)
        for row in range(rows):
            at = range(len(PROMPT))
            x = packed.hidden(PROMPT, [row] * len(PROMPT), at, table, pages)[-1:]
        x = x.expand(rows, -1)
        begin = time.perf_counter()
        for step in range(tokens):
            ids = packed.sample(packed.logits(x), range(rows), *greedy)
            x = packed.hidden(ids, range(rows), [len(PROMPT) + step] * rows, table, pages)
        return (time.perf_counter() - begin) / tokens / rows

    def read() -> float:
        n = -(-prompt // PAGE)
        pages, table = packed.pages(n), torch.arange(n, dtype=torch.int32)[None]
        begin = time.perf_counter()
        packed.logits(packed.hidden(range(prompt), [0] * prompt, range(prompt), table, pages)[-1:])
        return (time.perf_counter() - begin) / prompt

    return lambda: [decode(1), decode(8), decode(32), read()], packed.nbytes


if __name__ == "__main__":
    answer(prepare, sys.argv[1], *map(int, sys.argv[2:]))
