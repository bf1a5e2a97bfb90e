"""Chat templates of strangers: what they may use, and what ends them."""

import sys
from typing import Any

import pytest

from gptsmith import sandbox
from gptsmith.chat_template import environment
from gptsmith.chat_template.environment import ChatTemplateText
from gptsmith.chat_template.template import CHAT_TOKENS, TEMPLATE, ChatTemplate
from gptsmith.tokenizer import Tokenizer

MESSAGES = [{"role": "user", "content": "Hi\ud800 <b>&'"}, {"role": "assistant", "content": "Ho"}]
linux = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is enforced on Linux only")


def render(source: str, **variables: Any) -> str:
    return ChatTemplateText(source).render(messages=MESSAGES, **variables)


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ m.role + m['content'] }}{% endfor %}",
        "{{ messages | tojson(indent=1) }} {{ tools | tojson }} {{ missing }}",
        "{%- set ns = namespace(n=0) -%}"
        "{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
        "{{ ns.n }}",
        "{% for m in messages %}"
        "{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
        "{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f('a') }} {{ strftime_now('%Y') }}",
        "{% generation %}{{ messages[0].content | trim }}{% endgeneration %}",
    ],
)
def test_a_template_gives_the_same_text_in_the_worker(source: str) -> None:
    ours = ChatTemplateText(source, is_ours=True).render(messages=MESSAGES, tools=[{"a": None}])
    assert render(source, tools=[{"a": None}]) == ours


def test_the_default_template_needs_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "call", None)
    ChatTemplate(TEMPLATE, Tokenizer.byte().add_special_tokens(CHAT_TOKENS))


BIG = [
    "{{ '{:3000000000}'.format(1) }}",
    "{{ '%3000000000d' % 1 }}",
    "{{ 'a'.ljust(3000000000) }}",
    "{{ 'a'.zfill(3000000000) }}",
    "{{ ('\t' * 1000).expandtabs(3000000) }}",
    "{{ 'a' | center(3000000000) }}",
    "{{ 'a\na' | indent(3000000000) }}",
    "{{ messages | tojson(indent=300000000) }}",
    "{{ ('a' * 900000) * 900000 }}",
    "{{ ('a' * 9000000) | replace('', 'b' * 100) }}",
    "{{ 'x' * (messages | length * 900000000) }}",
    "{% set ns = namespace(x='aaaaaaaa') %}"
    "{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}"
    "{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
]
LONG = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 9 ** 99999999 }}",
    "{{ range(99999) | map('string') | list | sort | join | wordwrap(1) | length }}"
    "{% for i in range(99999) %}{{ (range(9999) | list | length) if false else '' }}"
    "{% set x = range(99999) | list %}{% endfor %}",
    "{% macro f(n) %}"
    "{% if n > 0 %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
]


@linux
@pytest.mark.parametrize("source", BIG)
def test_memory_is_bounded(source: str) -> None:
    with pytest.raises(sandbox.StoppedError, match=r"^the chat template was stopped at 256 MB of"):
        render(source)


@pytest.mark.parametrize("source", LONG)
def test_time_is_bounded(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_SECONDS", 0.4)
    with pytest.raises(sandbox.StoppedError, match=r"was stopped after 0\.4 s of processor time"):
        render(source)


def test_a_stopped_template_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplateText("{% if many %}{{ 'a' * 3000000000 }}{% endif %}{{ x }}")
    assert template.render(x="fine") == "fine"
    with pytest.raises(sandbox.StoppedError):
        template.render(many=True)
    monkeypatch.setattr(sandbox, "call", None)
    with pytest.raises(ValueError, match="the chat template was stopped at 256 MB of memory"):
        template.render(x="fine")


def test_a_template_that_is_slow_each_time_runs_out_of_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(environment, "_SECONDS", 0.5)
    monkeypatch.setattr(environment, "_REFILL", 0.001)  # less than it takes, however fast
    template = ChatTemplateText("{% for i in range(99999) %}{% set x = i ** 70 %}{% endfor %}")
    with pytest.raises(sandbox.StoppedError):  # noqa: PT012
        for _ in range(200):
            template.render()


def test_a_long_conversation_is_no_offence() -> None:
    long = [{"role": "user", "content": "word " * 2000}] * 300  # 3 MB
    source = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content | trim }}{% endfor %}"
    assert len(ChatTemplateText(source).render(messages=long)) > 2_900_000


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% break %}", r"chat template: cannot be compiled \('break' outside loop"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "chat template: cannot be compiled"),
        ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, "chat template: cannot be compiled"),
        ("{{ 1 " + "+ 1" * 30_000 + " }}", "chat template"),
        ("{{ x | nothing }}", r"chat template, line 1: No filter named 'nothing'"),
        ("{% include 'a' %}", "rejects this conversation: no loader"),
        ("{{ raise_exception('no\nway') }}", "rejects this conversation: no way$"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "rejects .*recursion"),
        ("{{ 'a' * 2000000 }}", "the chat template makes 2,000,000 characters"),
    ],
)
def test_errors_are_one_line(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]{1,300}$") as caught:
        render(source)
    caught.match(message)
