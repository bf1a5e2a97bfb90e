"""The answer of /v1/embeddings: a vector for each text, in OpenAI's form.

The vector is the mean of the model's last hidden vectors over the tokens of the text, scaled to
length 1. A model that was trained to continue texts was not trained to make such vectors: they tell
texts apart by their subject and wording, but embedding models do that better.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F

from gptsmith.generate.options import SamplingConfig
from gptsmith.generate.request import Generation, Request
from gptsmith.serve.protocol import EmbeddingBody


def requests(prompts: Sequence[Sequence[int]], namespace: str) -> list[Request]:
    """What the engine has to do for texts with these token ids."""
    nothing_new = SamplingConfig(max_new_tokens=0)
    return [
        Request(ids, nothing_new, context_shift=False, mean_vector=True, namespace=namespace)
        for ids in prompts
    ]


def answer(model: str, body: EmbeddingBody, found: Sequence[Generation]) -> dict[str, Any]:
    """What is sent for the generations of these requests."""
    data = [
        {"object": "embedding", "index": i, "embedding": _vector(generation, body.encoding_format)}
        for i, generation in enumerate(found)
    ]
    tokens = sum(g.mean_vector.count for g in found if g.mean_vector is not None)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}


def _vector(generation: Generation, encoding: str) -> list[float] | str:
    assert generation.mean_vector is not None
    vector = F.normalize(generation.mean_vector.value, dim=0)
    if encoding == "float":
        return vector.tolist()
    return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()
