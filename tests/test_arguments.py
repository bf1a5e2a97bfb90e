"""One text, path or message where several are expected is rejected, or is one."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import random_run

import gptsmith
from gptsmith.chat_template.template import CHAT_TOKENS, TEMPLATE, ChatTemplate
from gptsmith.data.chat import load_chat
from gptsmith.data.classification import encode_texts
from gptsmith.data.options import ChatFiles
from gptsmith.evaluate.likelihood import encode_pairs
from gptsmith.generate.request import Request
from gptsmith.model.config import ModelConfig
from gptsmith.model.lora import freeze
from gptsmith.model.state_dict import with_classification_head
from gptsmith.tokenizer import Tokenizer
from gptsmith.train.trackers import open_trackers

TOKENIZER = Tokenizer.byte().add_special_tokens(CHAT_TOKENS)
CONFIG = ModelConfig(
    n_layer=1, n_head=2, n_embd=16, context_length=64, vocab_size=TOKENIZER.vocab_size
)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> gptsmith.LoadedRun:
    path = tmp_path_factory.mktemp("run") / "run"
    return gptsmith.load(random_run(path, CONFIG, TOKENIZER, TEMPLATE).path)


def test_a_string_is_one_prompt(loaded: gptsmith.LoadedRun) -> None:
    one = loaded.generate("# text", max_new_tokens=5)
    assert isinstance(one, str)
    assert [one] == loaded.generate(["# text"], max_new_tokens=5)
    assert len(loaded.engine.generate("# text", gptsmith.SamplingConfig(max_new_tokens=5))) == 1


def test_a_string_is_one_stop_string(loaded: gptsmith.LoadedRun) -> None:
    whole = loaded.generate("a", max_new_tokens=40)
    stop = whole[3:5]
    expected = whole[: whole.index(stop)]
    assert loaded.generate("a", max_new_tokens=40, stop=stop) == expected
    assert loaded.generate("a", max_new_tokens=40, stop=[stop]) == expected
    assert Request([1], stop="ab").stop == ("ab",)
    with pytest.raises(ValueError, match="stop contains an empty string"):
        loaded.generate("a", stop="")


def test_a_list_of_ids_is_no_list_of_prompts(loaded: gptsmith.LoadedRun) -> None:
    with pytest.raises(
        ValueError, match=r"prompt 1 is a token id: several prompts of ids are \[\["
    ):
        loaded.engine.generate([1, 2])


def test_what_expects_several_rejects_one(loaded: gptsmith.LoadedRun) -> None:
    model, template = loaded.model, ChatTemplate(TEMPLATE, TOKENIZER)
    chat = gptsmith.Chat(model, TOKENIZER, template)
    message = {"role": "user", "content": "Hi"}
    calls = {
        "texts='# text'": [
            lambda: TOKENIZER.encode_batch("# text"),
            lambda: TOKENIZER.encode_arrays("# text"),
            lambda: Tokenizer.train_bpe("# text", 300),
            lambda: encode_texts(TOKENIZER, "# text", 8),
        ],
        "names='<|x|>'": [lambda: TOKENIZER.add_special_tokens("<|x|>")],
        "messages={'role'": [lambda: chat.reply(message), lambda: loaded.chat(message)],
        "messages='Hi'": [lambda: chat.reply("Hi")],
        "prompts={'role'": [lambda: loaded.generate(message)],
        "prompts=b'Hi'": [lambda: loaded.engine.generate(b"Hi")],
        "prompts=PosixPath('a')": [lambda: loaded.generate(Path("a"))],
        "pairs='ab'": [lambda: encode_pairs(TOKENIZER, "ab")],
        "sources='a.jsonl'": [lambda: load_chat("a.jsonl", ChatFiles(), template, 64)],
        "sources=PosixPath('a.jsonl')": [
            lambda: load_chat(Path("a.jsonl"), ChatFiles(), template, 64)
        ],
        "patterns='blocks.*'": [lambda: freeze(model, "blocks.*")],
        "labels='ab'": [lambda: with_classification_head(model, "ab")],
        "trackers='none'": [lambda: open_trackers("none", Path(), {}, None)],
    }
    for value, those in calls.items():
        wanted = re.escape(value) + ".*is one value, several are expected: give a list"
        for call in those:
            with pytest.raises(ValueError, match=wanted):
                call()


def test_ids_may_be_a_tensor_or_an_array(loaded: gptsmith.LoadedRun) -> None:
    few = gptsmith.SamplingConfig(max_new_tokens=4)
    expected = [g.ids for g in loaded.engine.generate([[65, 66], [67, 68]], few)]
    for rows in (torch.tensor([[65, 66], [67, 68]]), np.array([[65, 66], [67, 68]])):
        assert [g.ids for g in loaded.engine.generate(rows, few)] == expected
        with pytest.raises(ValueError, match="prompt 65 is a token id"):
            loaded.engine.generate(rows[0], few)


@pytest.mark.parametrize("ids", ["text", b"text", None, 5, [1.5], [[1, 2]], [None], {1: 2}])
def test_what_is_no_sequence_of_ids_is_rejected(ids: object, loaded: gptsmith.LoadedRun) -> None:
    for call in (Request, TOKENIZER.decode, TOKENIZER.decode_bytes):
        with pytest.raises(ValueError, match="expected one sequence of token ids") as caught:
            call(ids)  # type: ignore[operator]
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="expected one sequence of token ids"):
        loaded.engine.generate([torch.zeros(2, 2, dtype=torch.long)])


def test_a_wrong_stop_or_number_of_logprobs_is_rejected(loaded: gptsmith.LoadedRun) -> None:
    for stop in (b"x", [1], None, {"a": 1}):
        with pytest.raises(ValueError, match=r"stop=.*: give a text, or a list of texts"):
            loaded.generate("a", stop=stop)  # type: ignore[call-overload]
    for name in ("logprobs", "prompt_logprobs"):
        with pytest.raises(ValueError, match=f"{name}=-1: give 0 or more"):
            loaded.engine.add(Request([1], **{name: -1}))
    assert not loaded.engine.busy


def test_one_array_is_no_list_of_shards() -> None:
    with pytest.raises(ValueError, match=r"shards is one array, .*\[shard\]"):
        gptsmith.Windows(np.zeros(100, np.uint16), T=8)
