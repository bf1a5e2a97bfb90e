"""Text to token ids and back: training, loading, encoding, decoding."""

from gptsmith.tokenizer.tokenizer import (
    BEGINNINGS,
    ENDOFTEXT,
    PADS,
    SPECIAL_TOKENS,
    Tokenizer,
    TokenStream,
)

__all__ = ["BEGINNINGS", "ENDOFTEXT", "PADS", "SPECIAL_TOKENS", "TokenStream", "Tokenizer"]
