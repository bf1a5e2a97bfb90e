"""Tokens per second on a CPU, compared with llama.cpp and with the memory.

    python -m benchmarks decode [--rounds 5] [--tokens 64] [--prompt 512] [--weights int8,...]

A model of GPT-2's size with random weights, packed by us and exported to GGUF for llama-cpp-python
(`make test-gguf` installs it). One row is decoded greedily behind a short prompt; a step of ours is
vectors, logits and the choice of a token, one of llama.cpp llama_decode and the same choice. Each
contestant has its own process, so that no two OpenMP runtimes meet, and they alternate: medians
over the rounds. Beside them the share of what the memory gives in the same rounds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from gptsmith.model.config import ModelConfig

DATA = Path(
    os.environ.get("GPTSMITH_DATA", Path(__file__).parents[1] / "tests" / "fixtures" / "data")
)
PAIRS = {"bfloat16": "f16", "int8": "q8_0", "int4": "q4_0"}  # ours and llama.cpp's
CONFIG = ModelConfig.preset("gpt2")
PROMPT = [17, 4, 99, 1024, 7, 50000, 3, 12]

# What a contestant measures in a round: seconds a token of one row, of a row among 8 and among 32,
# and of a prompt's token.
Figures = tuple[float, ...]
# Its measurement, and the bytes of weights that a token of one row reads.
Contestant = tuple[Callable[[], Figures], int]


def ours(weights: str, _: Path, tokens: int, prompt: int) -> Contestant:
    from gptsmith.kernels.packed_model import PAGE, PackedModel
    from gptsmith.model.gpt import GPTModel

    torch.manual_seed(0)
    packed = PackedModel(GPTModel(CONFIG).eval(), weights)

    def decode(rows: int) -> float:
        n = -(-(len(PROMPT) + tokens) // PAGE)
        pages, table = packed.pages(rows * n), torch.arange(rows * n, dtype=torch.int32)
        table = table.view(rows, n)
        for row in range(rows):
            at = range(len(PROMPT))
            x = packed.hidden(PROMPT, [row] * len(PROMPT), at, table, pages)[-1:]
        x = x.expand(rows, -1)
        begin = time.perf_counter()
        for step in range(tokens):
            ids = packed.logits(x).argmax(dim=1)
            x = packed.hidden(ids, range(rows), [len(PROMPT) + step] * rows, table, pages)
        return (time.perf_counter() - begin) / tokens / rows

    def read() -> float:
        n = -(-prompt // PAGE)
        pages, table = packed.pages(n), torch.arange(n, dtype=torch.int32)[None]
        begin = time.perf_counter()
        packed.logits(packed.hidden(range(prompt), [0] * prompt, range(prompt), table, pages)[-1:])
        return (time.perf_counter() - begin) / prompt

    return lambda: (decode(1), decode(8), decode(32), read()), packed.nbytes


def llama_cpp_(kind: str, folder: Path, tokens: int, prompt: int) -> Contestant:
    import llama_cpp
    import numpy as np

    threads = torch.get_num_threads()
    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_default_params()
    [path] = folder.rglob(f"*{kind}.gguf")
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
    assert model, path

    def context(rows: int, length: int) -> llama_cpp.llama_context_p:
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_seq_max = rows * length, 512, rows
        options.n_threads = options.n_threads_batch = threads
        return llama_cpp.llama_init_from_model(model, options)

    def run(ctx: llama_cpp.llama_context_p, ids: Sequence[int], rows: Sequence[int],
            positions: Sequence[int], wanted: Sequence[int]) -> None:  # fmt: skip
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, (token, row, at) in enumerate(zip(ids, rows, positions, strict=True)):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, at, 1
            batch.seq_id[i][0], batch.logits[i] = row, i in wanted
        assert llama_cpp.llama_decode(ctx, batch) == 0
        llama_cpp.llama_batch_free(batch)

    def best(ctx: llama_cpp.llama_context_p, i: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(ctx, i)
        return int(np.ctypeslib.as_array(logits, shape=(CONFIG.vocab_size,)).argmax())

    def decode(rows: int) -> float:
        ctx = context(rows, len(PROMPT) + tokens)
        last = len(PROMPT) - 1
        for row in range(rows):
            run(ctx, PROMPT, [row] * len(PROMPT), range(len(PROMPT)), [last])
        ids = [best(ctx, last)] * rows
        begin = time.perf_counter()
        for step in range(tokens):
            run(ctx, ids, range(rows), [len(PROMPT) + step] * rows, range(rows))
            ids = [best(ctx, i) for i in range(rows)]
        seconds = time.perf_counter() - begin
        llama_cpp.llama_free(ctx)
        return seconds / tokens / rows

    def read() -> float:
        ctx = context(1, prompt)
        begin = time.perf_counter()
        run(ctx, range(prompt), [0] * prompt, range(prompt), [prompt - 1])
        seconds = time.perf_counter() - begin
        llama_cpp.llama_free(ctx)
        return seconds / prompt

    size = llama_cpp.llama_model_size(model)
    return lambda: (decode(1), decode(8), decode(32), read()), size


def memory() -> float:
    """Bytes/s of the best of several sums over 256 MiB, all threads at work."""
    numbers = torch.ones(2**25, dtype=torch.int64)
    best = float("inf")
    for _ in range(4):
        begin = time.perf_counter()
        numbers.sum()
        best = min(best, time.perf_counter() - begin)
    return 8 * len(numbers) / best


def quietly(work: Callable[..., None], *arguments: object) -> None:
    """llama.cpp describes every model and context on the error stream."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    work(*arguments)


def contestant(pipe: Connection, make: Callable[..., Contestant], *arguments: object) -> None:
    measure, weight_bytes = make(*arguments)
    pipe.send(weight_bytes)
    while pipe.recv():
        pipe.send(measure())


def export(folder: Path) -> None:
    """The same weights as GGUF files, f16, q8_0 and q4_0."""
    import llama_cpp

    from gptsmith.interop import gguf
    from gptsmith.interop.external_model import ExportableModel
    from gptsmith.model.gpt import GPTModel
    from gptsmith.tokenizer import Tokenizer

    torch.manual_seed(0)
    model = GPTModel(CONFIG)
    tokenizer = Tokenizer.gpt2(DATA / "gpt2_bpe")
    named = ExportableModel("random", CONFIG, model.state_dict, tokenizer)
    gguf.export(named, folder / "f16", "f16")
    gguf.export(named, folder / "q8_0", "q8_0")
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    source, target = folder / "f16" / "random-f16.gguf", folder / "random-q4_0.gguf"
    # llama.cpp's own, which keeps the head of a tied model in 6 bits
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), options) == 0


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks decode")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--weights", default=",".join(PAIRS), help="of " + ", ".join(PAIRS))
    options = parser.parse_args(argv)
    chosen = options.weights.split(",")
    try:
        import llama_cpp  # noqa: F401
    except ImportError:
        print("llama-cpp-python is not installed: make test-gguf installs it")
        return
    context = multiprocessing.get_context("spawn")
    sizes = (options.tokens, options.prompt)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        exporter = context.Process(target=quietly, args=(export, folder))
        exporter.start()
        exporter.join()
        assert exporter.exitcode == 0
        pipes: dict[str, Connection] = {}
        for weights in chosen:
            for title, make, kind in (
                (weights, ours, weights),
                (PAIRS[weights], llama_cpp_, PAIRS[weights]),
            ):
                pipes[title], there = context.Pipe()
                arguments = (contestant, there, make, kind, folder, *sizes)
                context.Process(target=quietly, args=arguments, daemon=True).start()
        read_bytes = {title: pipe.recv() for title, pipe in pipes.items()}
        figures: dict[str, list[Figures]] = {title: [] for title in pipes}
        speed = []
        for _ in range(options.rounds):
            speed.append(memory())
            for title, pipe in pipes.items():
                pipe.send(True)
                figures[title].append(pipe.recv())
        for pipe in pipes.values():
            pipe.send(False)
    limit = statistics.median(speed)
    print(f"{torch.get_num_threads()} threads; memory {limit / 1e9:.1f} GB/s; tokens per second")
    print(f"{'':10} {'1 row':>8} {'of limit':>9} {'8 rows':>8} {'32 rows':>8} {'prompt':>8}")
    for title, rounds in figures.items():
        one, eight, many, prompt = (
            1 / statistics.median(column) for column in zip(*rounds, strict=True)
        )
        share = one * read_bytes[title] / limit
        print(f"{title:10} {one:8.1f} {share:9.0%} {eight:8.0f} {many:8.0f} {prompt:8.0f}")


if __name__ == "__main__":
    main([])
