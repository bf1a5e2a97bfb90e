"""Options of text generation; this file does not import torch."""

from pydantic import Field

from gptsmith.config import Section


class SamplingConfig(Section):
    """How the next token is chosen."""

    max_new_tokens: int = Field(200, ge=0)
    """Stop after this many tokens; 0 only reads the prompt."""
    temperature: float = Field(0.8, ge=0)
    """Divides the logits: lower is more predictable, higher more varied, 0 is greedy decoding."""
    top_k: int | None = Field(None, ge=1)
    """Sample from the k most likely tokens only."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Sample from the smallest set of most likely tokens that reaches this total probability."""
    min_p: float | None = Field(None, ge=0, le=1)
    """Sample from tokens that have at least this fraction of the highest probability."""
    repetition_penalty: float = Field(1.0, gt=0)
    """Above 1, tokens that already occur in the prompt or the completion become less likely."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that already occur in the completion."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time that it occurs in the completion."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the first completion; completion i has SEED + i. The same seed gives the same text: a
    token's random number depends only on the seed and its position."""

    def with_seed(self, seed: int) -> "SamplingConfig":
        """The same settings with another seed."""
        return self.model_copy(update={"seed": seed})


DEFAULT_SAMPLING = SamplingConfig()
