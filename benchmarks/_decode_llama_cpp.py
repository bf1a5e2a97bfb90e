"""llama.cpp as a contestant of `decode`: FILE.gguf TOKENS PROMPT THREADS.

Or, to quantize to q4_0: SOURCE.gguf TARGET.gguf. Needs llama-cpp-python and NumPy only.
"""

import sys
import time
from collections.abc import Callable, Sequence

import llama_cpp
import numpy as np
from benchmarks._contestant import PROMPT, answer


def prepare(
    path: str, tokens: int, prompt: int, threads: int
) -> tuple[Callable[[], list[float]], int]:
    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
    assert model, path
    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

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
        return int(np.ctypeslib.as_array(logits, shape=(vocab_size,)).argmax())

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

    return lambda: [decode(1), decode(8), decode(32), read()], llama_cpp.llama_model_size(model)


def quantize(source: str, target: str) -> None:
    """Its own q4_0, which keeps the head of a tied model in 6 bits."""
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    assert llama_cpp.llama_model_quantize(source.encode(), target.encode(), options) == 0


if __name__ == "__main__":
    if len(sys.argv) == 3:
        quantize(*sys.argv[1:])
    else:
        answer(prepare, sys.argv[1], *map(int, sys.argv[2:]))
