"""Whole steps of the engine on a GPU: `python -m benchmarks decode --device cuda`.

GPT-2 124M with random weights, greedy, rows of equal length. A step schedules, computes, samples,
and gives each row its token. The median of the rounds; the first tokens of each, in which graphs
are captured, do not count.
"""

from __future__ import annotations

import statistics
import time

import torch

from gptsmith.generate import forward
from gptsmith.generate.engine import Engine
from gptsmith.generate.options import SamplingConfig
from gptsmith.generate.request import Request
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel

ROWS = 1, 8, 32, 256
WARM_UP = 4  # tokens


def seconds_per_step(model: GPTModel, rows: int, tokens: int, prompt: int, rounds: int) -> float:
    engine = Engine(model, max_batch_size=rows)
    V = model.config.vocab_size
    room = model.config.context_length - prompt  # those that start first wait for nobody
    sampling, found = SamplingConfig(temperature=0, max_new_tokens=room), []
    for i in range(rounds):
        starts = range(i * rows, (i + 1) * rows)  # no shared prefixes
        made = [
            engine.add(Request([start % V, *(n % V for n in range(prompt - 1))], sampling))
            for start in starts
        ]
        while len(engine._scheduler.decoding) < rows:
            engine.step()
        for _ in range(WARM_UP):
            engine.step()
        begin = time.perf_counter()
        for _ in range(tokens):
            engine.step()  # reads its tokens, so it waits for the device
        found.append((time.perf_counter() - begin) / tokens)
        assert all(generation.finish_reason is None for generation in made)
        for generation in made:
            engine.cancel(generation)
        engine.step()
    return statistics.median(found)


def compare(device: str, rounds: int, tokens: int, prompt: int) -> None:
    """Print the tokens per second of every number of rows."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        print(f"no device {device}: nothing measured")
        return
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    print(f"{name}, PyTorch {torch.__version__}, prompts of {prompt} tokens; tokens per second")
    print(f"{'':28}" + "".join(f"{f'{rows} rows':>12}" for rows in ROWS))
    torch.manual_seed(0)
    model = GPTModel(ModelConfig.preset("gpt2")).eval().to(device)
    real = forward.decodes_by_graph
    for dtype in (torch.bfloat16, torch.float32):
        model.to(dtype)
        for title, static in (("graphs", real), ("launched operations", lambda device: False)):
            forward.decodes_by_graph = static
            line = f"{str(dtype).removeprefix('torch.')}, {title:18}"
            speed = [rows / seconds_per_step(model, rows, tokens, prompt, rounds) for rows in ROWS]
            print(f"{line:28}" + "".join(f"{value:12,.0f}" for value in speed), flush=True)
    forward.decodes_by_graph = real
