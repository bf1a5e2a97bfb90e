"""Greedy texts of vLLM, in a process of its own: `VLLM_PYTHON vllm_texts.py JOBS.json OUT.json`.

Jobs: [{"folder": an export of ours, "prompts": [[id, ...], ...], "chats": [[message, ...], ...]}].
The answer, for each job: {"texts": [[id, ...], ...], "replies": [{"prompt", "ids", "text"}, ...]}.
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

LIMIT = 24  # tokens


def texts_of(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    llm = LLM(
        job["folder"],
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=4,
        kv_cache_memory_bytes=1 << 26,
    )
    greedy = SamplingParams(temperature=0, max_tokens=LIMIT)
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    texts = llm.generate(prompts, greedy, use_tqdm=False) if prompts else []
    chats = job.get("chats", [])
    replies = llm.chat(chats, greedy, use_tqdm=False) if chats else []
    found = {
        "texts": [list(text.outputs[0].token_ids) for text in texts],
        "replies": [
            {
                "prompt": list(reply.prompt_token_ids),
                "ids": list(reply.outputs[0].token_ids),
                "text": reply.outputs[0].text,
            }
            for reply in replies
        ],
    }
    del llm
    gc.collect()
    return found


def main(jobs: str, out: str) -> None:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    found = []
    for job in json.loads(Path(jobs).read_text()):
        found.append(texts_of(job))
        cleanup_dist_env_and_memory()
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    # The models are opened one after the other in this process, without an engine process each.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    main(*sys.argv[1:])
