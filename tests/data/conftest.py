import pytest
from chats import OURS

from gptsmith.chat_template.template import ChatTemplate


@pytest.fixture(scope="session")
def template() -> ChatTemplate:
    """The built-in template over bytes."""
    return OURS
