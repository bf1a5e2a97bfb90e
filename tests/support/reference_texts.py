"""Small models of every kind, what generates the same by definition, and random requests."""

import torch
from hypothesis import strategies as st

from gptsmith.generate.options import SamplingConfig
from gptsmith.generate.sampling import penalize, sample, uniform
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel

CONTEXT, V = 16, 23
GPT2 = ModelConfig(
    n_layer=2, n_head=4, n_embd=16, context_length=CONTEXT, vocab_size=V,
    norm="layernorm", mlp="gelu", position="learned", bias="all",
)  # fmt: skip
LLAMA = GPT2.change(norm="rmsnorm", mlp="swiglu", position="rope", bias="none", n_kv_head=2)
MODELS = {
    "learned positions": GPT2,
    "rope, 2 kv heads": LLAMA,
    "rope, 1 kv head, window": LLAMA.change(
        n_kv_head=1, qk_norm=True, tie_embeddings=False, mask="causal() & sliding_window(5)"
    ),
    "prefix": GPT2.change(mask="prefix(4)"),
    "prefix and window": LLAMA.change(mask="sliding_window(6) & prefix(3)"),
    "bidirectional": LLAMA.change(mask="bidirectional()"),
    "context of 1": GPT2.change(context_length=1),
}


@torch.no_grad()
def full_forward(
    model: GPTModel, prompt: list[int], config: SamplingConfig, seed: int
) -> list[int]:
    """The definition: one row, the full forward pass for every token."""
    limit = model.config.context_length
    context, new = list(prompt), []
    counts = dict.fromkeys(prompt, 0)
    for _ in range(config.max_new_tokens):
        if len(context) > limit:
            context = context[-max(1, limit // 2) :]
        logits = model(torch.tensor([context]))[0, -1]
        penalize(logits, config, counts, {})
        position = len(prompt) + len(new)
        [token] = sample(logits[None], [config], [uniform(seed, position)])
        counts[token] = counts.get(token, 0) + 1
        context.append(token)
        new.append(token)
    return new


prompt_lists = st.lists(st.integers(0, V - 1), min_size=1, max_size=CONTEXT + 4)
samplings = st.builds(
    SamplingConfig,
    max_new_tokens=st.integers(1, 2 * CONTEXT),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_k=st.none() | st.integers(1, V),
    top_p=st.none() | st.floats(0.1, 1),
    min_p=st.none() | st.floats(0, 0.3),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 100),
)
