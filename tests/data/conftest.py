import pytest

from gptsmith.chat_template.template import CHAT_TOKENS, TEMPLATE, ChatTemplate
from gptsmith.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def template() -> ChatTemplate:
    """The default template over bytes."""
    return ChatTemplate(TEMPLATE, Tokenizer.byte().add_special_tokens(CHAT_TOKENS))
