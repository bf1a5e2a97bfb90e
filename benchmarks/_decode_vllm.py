"""vLLM's offline engine as a contestant of `decode`: FOLDER TOKENS PROMPT.

Its engine does more in a step than the others here (it schedules, and makes text); how long a
decoding step takes is the time for TOKENS + 1 tokens less the time for one.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks._contestant import PROMPT, answer


def prepare(folder: str, tokens: int, prompt: int) -> tuple[Callable[[], list[float]], int]:
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder,
        dtype="bfloat16",
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_num_seqs=32,
        kv_cache_memory_bytes=1 << 29,
    )

    def seconds(ids: list[int], rows: int, count: int) -> float:
        wanted = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": ids} for _ in range(rows)]
        begin = time.perf_counter()
        llm.generate(prompts, wanted, use_tqdm=False)
        return time.perf_counter() - begin

    def decode(rows: int) -> float:
        # The least of three: a single time was once longer than that of all tokens.
        one = min(seconds(PROMPT, rows, 1) for _ in range(3))
        return (seconds(PROMPT, rows, tokens + 1) - one) / tokens / rows

    def read() -> float:
        return seconds([*range(prompt)], 1, 1) / prompt

    for rows in (1, 8, 32):  # what is compiled at the first use
        seconds(PROMPT, rows, 2)
    return (
        lambda: [decode(1), decode(8), decode(32), read()],
        sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")),
    )


if __name__ == "__main__":
    answer(prepare, sys.argv[1], *map(int, sys.argv[2:]))
