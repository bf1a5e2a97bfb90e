"""Instructions as examples: prompts, which tokens are targets, and what does not fit."""

import random

import pytest
from instruction_rows import ALONE, BPE, PAIRED, ROWS, encoded, row

from gptsmith.chat_template.template import ChatTemplate
from gptsmith.data.instructions import ALPACA_PROMPT, Instruction, Prompt
from gptsmith.tokenizer import SPECIAL_TOKENS, Tokenizer


def test_classic_prompt_is_that_of_alpaca():
    rows = [Instruction(*r.values(), "here") for r in ROWS]
    found, _ = encoded(rows, BPE)
    for (kept, example), prompt in zip(found, (ALONE, PAIRED), strict=False):
        assert BPE.decode(example.ids) == f"{prompt}{kept.output}<|endoftext|>"
        assert BPE.decode(example.ids[example.labels != -100]) == f"{kept.output}<|endoftext|>"
        assert example.ids[-1] == example.labels[-1] == BPE.eos_id


@pytest.mark.parametrize("kind", ["bpe", "byte", "gpt2"])
def test_prompt_ids_begin_the_example_and_are_masked(kind, request):
    """The example begins with the ids of the prompt, and exactly these are masked."""
    if kind == "gpt2":
        tokenizer = Tokenizer.gpt2(request.getfixturevalue("real_data") / "gpt2_bpe")
    else:
        tokenizer = BPE if kind == "bpe" else Tokenizer.byte()
    prompt = Prompt.parse()
    template = ChatTemplate(prompt.template("<|endoftext|>"), tokenizer)
    chance = random.Random(0)
    letters = "abz \n\t#:.'1\u00e9\U0001f600"
    texts = ["x" + "".join(chance.choices(letters, k=chance.randrange(20))) for _ in range(200)]
    rows = [row(a, b, c[1:] + "e") for a, b, c in zip(texts, texts[1:], texts[2:], strict=False)]
    for kept, example in encoded(rows, tokenizer)[0]:
        asked = template.prompt(prompt.messages(kept))
        n = len(asked)
        assert example.ids[:n].tolist() == asked
        assert (example.labels[:n] == -100).all()
        assert (example.labels[n:] == example.ids[n:]).all()
        assert tokenizer.decode(example.ids[n:]) == kept.output.strip() + "<|endoftext|>"
    assert template.stop_ids == (tokenizer.eos_id,)


def test_template_agrees_with_transformers(tmp_path):
    """transformers renders the same template to the same text, including white space."""
    from transformers import PreTrainedTokenizerFast

    BPE.save(tmp_path / "tokenizer.json")
    rows = [row(" a\n", " b\n", " c\n"), row()]
    for text in (ALPACA_PROMPT, 'Oh.\n\n Q: {instruction} \n\n"{input}"\n\u00e9\U0001f600:\n'):
        prompt = Prompt.parse(text)
        stock = PreTrainedTokenizerFast(
            tokenizer_file=str(tmp_path / "tokenizer.json"),
            chat_template=prompt.template("<|endoftext|>"),
        )
        for kept, example in encoded(rows, BPE, text)[0]:
            answer = {"role": "assistant", "content": kept.output}
            messages = [*prompt.messages(kept), answer]
            assert stock.apply_chat_template(messages, tokenize=False) == BPE.decode(example.ids)
            ids = stock.apply_chat_template(messages, tokenize=True, return_dict=False)
            assert ids == example.ids.tolist()


def test_several_turns():
    """A chat has the opening once, then alternating questions and answers."""
    template = ChatTemplate(Prompt.parse().template("<|endoftext|>"), BPE)
    turns = [("user", "Hi"), ("assistant", "Ho"), ("user", "What?")]
    text = BPE.decode(template.prompt([{"role": r, "content": c} for r, c in turns]))
    assert text == (
        ALONE.replace("Name a colour.", "Hi") + "Ho<|endoftext|>"
        "\n\n### Instruction:\nWhat?\n\n### Response:\n"
    )


def test_unmasked_prompt():
    found, _ = encoded([row()], BPE, mask_prompt=False)
    assert (found[0][1].labels == found[0][1].ids).all()


def test_special_tokens_in_the_data_are_plain_text():
    tokenizer = Tokenizer.byte().add_special_tokens(SPECIAL_TOKENS)
    special = set(tokenizer.special_tokens.values())
    for literal in SPECIAL_TOKENS:
        ((_, example),) = encoded([row(literal, f"a{literal}", literal * 2)], tokenizer)[0]
        assert [i for i in example.ids.tolist() if i in special] == [tokenizer.eos_id]
        assert example.ids[-1] == tokenizer.eos_id


def test_rows_that_do_not_fit_are_skipped_not_truncated():
    rows = [row(), row(output="word " * 100), row(given="word " * 100)]
    ((_, example),) = encoded(rows[:1], BPE)[0]
    n = len(example.ids)
    found, report = encoded(rows, BPE, T=n - 1)
    assert [kept for kept, _ in found] == rows[:1]
    assert report.skipped.counts() == {f"longer than the context of {n - 1} tokens": 1}
    assert encoded(rows[:1], BPE, T=n - 2)[0] == []


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("Do it.\n\nQ: {instruction} ({input})\nA:\n",
         ["Do it.\n\nQ: Add (1 + 2)\nA:\n3", "Do it.\n\nQ: Hi)\nA:\nHo"]),
        ("{instruction}\n=>\n", ["Add\n1 + 2\n=>\n3", "Hi\n=>\nHo"]),
        ("{{ {instruction}{input}{% x\n", ["{{ Add1 + 2{% x\n3", "{{ Hi{% x\nHo"]),
    ],
)  # fmt: skip
def test_custom_prompts(prompt, texts):
    byte = Tokenizer.byte()
    found, _ = encoded([row("Add", "1 + 2", "3"), row("Hi", "", "Ho")], byte, prompt)
    assert [byte.decode(e.ids).removesuffix("<|endoftext|>") for _, e in found] == texts


@pytest.mark.parametrize(
    "text",
    ["Answer this:\n", "{input} {instruction}\n.", "{instruction} {instruction}:",
     "Q: {instruction}", "{instruction} {input} ", "{instruction}\n{input}{input}:",
     "{instruction} A: ", r"Q: {instruction}\nA:"],
)  # fmt: skip
def test_invalid_prompts_are_rejected(text):
    with pytest.raises(ValueError, match=r"^the prompt .* (must contain|must end|contains a)"):
        Prompt.parse(text)
