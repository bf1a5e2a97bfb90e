"""Text to token ids and back: training, loading, encoding, decoding."""

from gptsmith.tokenizer.stream import TokenStream
from gptsmith.tokenizer.tokenizer import (
    BEGINNINGS,
    ENDOFTEXT,
    PADS,
    SPECIAL_TOKENS,
    Tokenizer,
)

__all__ = ["BEGINNINGS", "ENDOFTEXT", "PADS", "SPECIAL_TOKENS", "TokenStream", "Tokenizer"]
