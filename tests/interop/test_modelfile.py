"""Jinja templates in Ollama's language. The expected texts were checked with Go itself."""

import pytest

from gptsmith.chat_template.template import ChatTemplate
from gptsmith.interop import modelfile
from gptsmith.tokenizer import Tokenizer


def chat(template: str, *tokens: str) -> ChatTemplate:
    return ChatTemplate(template, Tokenizer.byte().add_special_tokens(tokens))


CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "<|im_start|>system\nUse {{ '{{' }}.<|im_end|>\n{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_template_with_default_system_message() -> None:
    go = modelfile.go_template(chat(CHATML, "<|im_start|>", "<|im_end|>"), None)
    assert go is not None
    opening = '<|im_start|>system\nUse {{ "{{" }}.<|im_end|>\n'
    assert go.startswith("{{ if not .System }}" + opening + "{{ end }}{{ range")
    assert '"user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n{{ else if' in go
    assert go.endswith('(ne .Role "assistant") }}<|im_start|>assistant\n{{ end }}{{ end }}')


def test_bos_is_not_repeated() -> None:
    begun = chat("<s>" + CHATML, "<s>", "<|im_start|>", "<|im_end|>")
    whole, cut = modelfile.go_template(begun, None), modelfile.go_template(begun, "<s>")
    assert whole is not None
    assert whole.count("<s>") == 2  # the opening with and without a system message
    assert cut == whole.replace("<s>", "")


NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "{{ '[' + m.content + ']</s>' }}{% endfor %}"
)
FIRST = "{% for m in messages %}{{ ('[' if loop.first else '(') + m.content + '</s>' }}{% endfor %}"


QUOTES = "{% for m in messages %}{{ m.role + '\"\"\"' + m.content + '</s>' }}{% endfor %}"


@pytest.mark.parametrize("template", [NO_SYSTEM, FIRST, QUOTES])
def test_unsupported_template_has_no_go_template(template: str) -> None:
    assert modelfile.go_template(chat(template, "</s>"), None) is None
