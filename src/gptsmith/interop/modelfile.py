"""The Modelfile with which Ollama serves a GGUF file.

Ollama does not run the Jinja template inside a GGUF file: its templates are written in Go's
text/template (https://docs.ollama.com/template), so ours is translated.
"""

import re
from collections.abc import Sequence

from gptsmith.chat_template.template import ChatTemplate

_CONTENT = "\ufdd0"  # stands for a message's content; a Unicode noncharacter
_MARK = re.compile("\ufdd0\\d+\ufdd1")


def text(name: str, context: int, stops: Sequence[str], template: str | None) -> str:
    """The Modelfile for NAME.gguf in the same folder; without a template Ollama chooses one."""
    lines = [f"# ollama create {name} -f Modelfile", f"FROM ./{name}.gguf"]
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join([*lines, f"PARAMETER num_ctx {context}", ""])


def go_template(chat: ChatTemplate, bos: str | None) -> str | None:
    """A Go template that renders conversations as `chat` does; None if it cannot be translated.

    It can if a conversation consists of an opening (only without a system message), one block per
    message that depends on its role alone, and the generation prompt after a last message that is
    not the assistant's. bos: a token that llama.cpp itself puts before every text.
    """
    try:
        blocks, opening, prompt = _blocks(chat)
    except ValueError:  # for example, it does not accept system messages
        return None
    if bos:
        opening = opening.removeprefix(bos)
        blocks["system"] = blocks["system"].removeprefix(bos)
    branches = []
    for role, block in blocks.items():
        before, after = map(_literal, block.split(_CONTENT))
        if role == "assistant":  # the last one is to be continued
            after = f"{{{{ if not $last }}}}{after}{{{{ end }}}}"
        branches.append(f'if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}')
    written = (
        (f"{{{{ if not .System }}}}{_literal(opening)}{{{{ end }}}}" if opening else "")
        + "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}{{ "
        + "{{ else ".join(branches)
        + '{{ end }}{{ if and $last (ne .Role "assistant") }}'
        + _literal(prompt)
        + "{{ end }}{{ end }}"
    )
    return None if '"""' in written else written


def _blocks(chat: ChatTemplate) -> tuple[dict[str, str], str, str]:
    """The block of each role, the opening, and the generation prompt; ValueError if rendered
    conversations do not consist of them."""

    def shape(*roles: str, generate: bool = False) -> str:
        return _MARK.sub(_CONTENT, chat.layout(roles, generate))

    one, two = shape("user"), shape("user", "assistant")
    user = shape("user", "assistant", "user").removeprefix(two)
    blocks = {
        "system": shape("system", "user").removesuffix(user),
        "user": user,
        "assistant": two.removeprefix(one),
    }
    opening, prompt = one.removesuffix(user), shape("user", generate=True).removeprefix(one)
    talk = ("user", "assistant", "user", "assistant", "user")
    for roles in (talk[:1], talk[:2], talk, ("system", *talk[:2]), ("system", *talk)):
        whole = ("" if roles[0] == "system" else opening) + "".join(blocks[r] for r in roles)
        prompted = whole + prompt
        if whole != shape(*roles) or (
            roles[-1] == "user" and prompted != shape(*roles, generate=True)
        ):
            raise ValueError("the blocks of this template depend on more than their roles")
    if any(block.count(_CONTENT) != 1 for block in blocks.values()):
        raise ValueError("a block of this template has no content, or more than one")
    return blocks, opening, prompt


def _literal(text: str) -> str:
    """Plain text in a Go template."""
    return text.replace("{{", '{{ "{{" }}')
