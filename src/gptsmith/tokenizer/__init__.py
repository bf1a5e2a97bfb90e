"""Text to token ids and back: training, loading, encoding, decoding."""

from gptsmith.tokenizer.formats import ENDOFTEXT
from gptsmith.tokenizer.roles import TokenRoles
from gptsmith.tokenizer.special_ids import DocumentTokens
from gptsmith.tokenizer.stream import TokenStream
from gptsmith.tokenizer.tokenizer import SPECIAL_TOKENS, Tokenizer

__all__ = [
    "ENDOFTEXT",
    "SPECIAL_TOKENS",
    "DocumentTokens",
    "TokenRoles",
    "TokenStream",
    "Tokenizer",
]
