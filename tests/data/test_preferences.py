"""Pairs of a better and a worse answer, from the formats in use to examples."""

import json
from datetime import date
from pathlib import Path

import pytest
import torch
from chats import OURS, learned, talk, target_texts
from data_sets import complete_data
from random_weights import add_noise
from tables import write

from gptsmith.batch import IGNORE_INDEX
from gptsmith.data.options import PreferenceFiles
from gptsmith.data.pair_rows import PairRows
from gptsmith.data.pairs import Pairs, load_pairs
from gptsmith.data.preferences import PairCounts, read_pairs
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.train.preference import PreferenceLoss

ASKED, BETTER, WORSE = "What is 2 + 2?", "It is 4.", "It is 5."
HUMAN = f"\n\nHuman: {ASKED}\n\nAssistant:"


def answer(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


FORMS = {
    "trl text": {"prompt": ASKED, "chosen": BETTER, "rejected": WORSE},
    "trl messages": {"prompt": talk(ASKED), "chosen": answer(BETTER), "rejected": answer(WORSE)},
    "trl implicit": {"chosen": talk(ASKED, BETTER), "rejected": talk(ASKED, WORSE)},
    "hh": {"chosen": f"{HUMAN} {BETTER}", "rejected": f"{HUMAN} {WORSE}"},
    "hh prompt": {"prompt": HUMAN, "chosen": f" {BETTER}", "rejected": f" {WORSE}"},
    "llamafactory": {
        "conversations": [{"from": "human", "value": ASKED}],
        "chosen": {"from": "gpt", "value": BETTER},
        "rejected": {"from": "gpt", "value": WORSE},
    },
    "ultrafeedback": {
        "prompt": ASKED, "prompt_id": "ab", "chosen": talk(ASKED, BETTER),
        "rejected": talk(ASKED, WORSE), "messages": talk(ASKED, BETTER),
        "score_chosen": 8.5, "score_rejected": 3.0,
    },
    "openai": {
        "input": {"messages": talk(ASKED), "tools": []},
        "preferred_output": answer(BETTER), "non_preferred_output": answer(WORSE),
    },
    "orca": {"system": "", "question": ASKED, "chosen": BETTER, "rejected": WORSE},
    "json in a table": {
        "chosen": json.dumps(talk(ASKED, BETTER)), "rejected": json.dumps(talk(ASKED, WORSE)),
    },
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_forms_in_use_give_the_same_pair(form: str, tmp_path: Path) -> None:
    pairs, counts = load_pairs(
        [write(tmp_path / "a.jsonl", FORMS[form])], PreferenceFiles(), OURS, 64
    )
    chosen, rejected = pairs.examples
    assert target_texts(chosen) == [f"<|assistant|>{BETTER}<|end|>"]
    assert target_texts(rejected) == [f"<|assistant|>{WORSE}<|end|>"]
    for example in (chosen, rejected):
        start = int((example.labels != IGNORE_INDEX).argmax())
        question = OURS.tokenizer.decode(example.ids[:start])
        assert question == f"<|user|>{ASKED}<|end|>"
    assert str(counts) == "1 pair is trained on"


def test_messages_of_a_table_may_have_dates(tmp_path: Path) -> None:
    said = talk(ASKED, BETTER), talk(ASKED, WORSE)
    sides = [[{**message, "sent": date(2024, 2, 29)} for message in side] for side in said]
    path = write(tmp_path / "a.parquet", {"chosen": sides[0], "rejected": sides[1]})
    pairs, counts = load_pairs([path], PreferenceFiles(), OURS, 90)
    assert target_texts(pairs.examples[0]) == [f"<|assistant|>{BETTER}<|end|>"]
    assert str(counts) == "1 pair is trained on; field 'sent' of messages is not used"


def test_instructions_with_input_and_a_system_message(tmp_path: Path) -> None:
    row = {
        "instruction": "Add.", "input": "2, 2", "system": "Be brief.", "output": "4",
        "chosen": BETTER, "rejected": WORSE,
    }  # fmt: skip
    pairs, counts = load_pairs([write(tmp_path / "a.jsonl", row)], PreferenceFiles(), OURS, 64)
    text = OURS.tokenizer.decode(pairs.examples[0].ids)
    assert text.startswith("<|system|>Be brief.<|end|><|user|>Add.\n\n2, 2<|end|><|assistant|>It")
    assert str(counts).endswith("column 'output' is not used")


def test_an_answer_may_repeat_the_question(tmp_path: Path) -> None:
    row = {"prompt": "Say hello", "chosen": "hello", "rejected": "Say hello", "best": "hello"}
    pairs, counts = load_pairs([write(tmp_path / "a.jsonl", row)], PreferenceFiles(), OURS, 64)
    text = OURS.tokenizer.decode(pairs.examples[1].ids)
    assert text == "<|user|>Say hello<|end|><|assistant|>Say hello<|end|>"
    assert str(counts) == "1 pair is trained on"


def test_a_context_or_system_message_may_be_repeated_by_an_answer(tmp_path: Path) -> None:
    row = {
        "instruction": "Echo.", "input": "hello", "system": "Be brief.",
        "chosen": "hello", "rejected": "Be brief.",
    }  # fmt: skip
    pairs, _ = load_pairs([write(tmp_path / "a.jsonl", row)], PreferenceFiles(), OURS, 64)
    assert OURS.tokenizer.decode(pairs.examples[0].ids) == (
        "<|system|>Be brief.<|end|><|user|>Echo.\n\nhello<|end|><|assistant|>hello<|end|>"
    )


def test_only_what_follows_the_shared_messages_is_compared(tmp_path: Path) -> None:
    rows = [{"chosen": talk("a", "b", "c", "d"), "rejected": talk("a", "b", "c", "e", "f", "g")}]
    pairs, _ = load_pairs([write(tmp_path / "a.jsonl", *rows)], PreferenceFiles(), OURS, 64)
    chosen, rejected = pairs.examples
    assert target_texts(chosen) == ["<|assistant|>d<|end|>"]
    assert target_texts(rejected) == ["<|assistant|>e<|end|>", "<|assistant|>g<|end|>"]


def test_scores_decide_unless_they_are_ignored(tmp_path: Path) -> None:
    row = {"prompt": ASKED, "chosen": BETTER, "rejected": WORSE}
    scores = [(2, 1), (1, 2), ("3", "3"), (None, 1)]
    rows = [{**row, "score_chosen": a, "score_rejected": b} for a, b in scores]
    path = write(tmp_path / "a.jsonl", *rows)
    pairs, counts = load_pairs([path], PreferenceFiles(), OURS, 64)
    assert [target_texts(example)[0][19] for example in pairs.examples] == list("455445")
    assert str(counts) == (
        f"left out: 1 of 4 pairs (25.0%), with equal scores: 1 ({path}:3); 3 pairs are trained on; "
        f"swapped, since the rejected answer has the better score: 1 ({path}:2)"
    )
    pairs, counts = load_pairs([path], PreferenceFiles(scores=False), OURS, 64)
    assert [target_texts(example)[0][19] for example in pairs.examples] == list("45454545")


def test_pairs_that_teach_nothing_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [
        {"prompt": ASKED, "chosen": BETTER, "rejected": WORSE},
        {"prompt": ASKED, "chosen": BETTER, "rejected": BETTER},
        {"prompt": "x" * 90, "chosen": BETTER, "rejected": WORSE},
        {"chosen": talk(ASKED, BETTER), "rejected": talk("Else?", WORSE)},
        {"chosen": talk(ASKED, BETTER), "rejected": talk(ASKED, BETTER, "More?", WORSE)},
    ]
    path = write(tmp_path / "a.jsonl", *rows)
    pairs, counts = load_pairs([path], PreferenceFiles(), OURS, 64)
    assert len(pairs) == counts.kept == 1
    assert str(counts).startswith("left out: 4 of 5 pairs (80.0%), with equal answers: 1 (")
    for reason in (
        "longer than 65 tokens: 1",
        "with different questions: 1",
        "with an answer that goes on after the other: 1",
    ):
        assert reason in str(counts)
    with pytest.raises(ValueError, match=r"no pair is left: left out: 1 of 1 .*with equal .*\)$"):
        load_pairs([write(tmp_path / "b.jsonl", rows[1])], PreferenceFiles(), OURS, 64)
    (tmp_path / "c.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"no pair is left: there are no rows$"):
        load_pairs([tmp_path / "c.jsonl"], PreferenceFiles(), OURS, 64)


def test_first_turns_are_left_out_of_both_sides_until_they_fit(tmp_path: Path) -> None:
    before = ("first", "one", "second", "two")
    row = {"chosen": talk(*before, ASKED, BETTER), "rejected": talk(*before, ASKED, WORSE * 3)}
    path = write(tmp_path / "a.jsonl", row)
    pairs, counts = load_pairs([path], PreferenceFiles(), OURS, 56)
    texts = [OURS.tokenizer.decode(example.ids) for example in pairs.examples]
    assert all(text.startswith("<|user|>second") for text in texts)
    assert "without their first turns, which do not fit: 1" in str(counts)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"chosen": "", "rejected": "b", "prompt": "c"}, "message 2 of 2: an empty answer"),
        ({"chosen": "a", "rejected": "b"}, "no question in 'chosen', 'rejected': --prompt-column"),
        ({"chosen": "a", "rejected": 5.5, "prompt": [1]}, "holds a list, not text"),
        ({"chosen": talk("a", "b"), "rejected": "b"}, "one begins with a question, the other with"),
        (
            {
                "chosen": "a",
                "rejected": "b",
                "prompt": "c",
                "chosen_score": "x",
                "rejected_score": 1,
            },
            "not numbers",
        ),
        ({"text": "a"}, "which columns hold the better and the worse answer? Choose from 'text'"),
    ],
)
def test_rows_that_are_no_pairs_name_their_place(row: dict, problem: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", row)
    with pytest.raises(ValueError) as error:
        load_pairs([path], PreferenceFiles(), OURS, 64)
    assert str(error.value).startswith(f"{path}:1: ")
    assert problem in str(error.value)


def test_rows_that_are_no_pairs_are_skipped_on_request(tmp_path: Path) -> None:
    good = {"prompt": ASKED, "chosen": BETTER, "rejected": WORSE}
    path = write(tmp_path / "a.jsonl", good, {"prompt": ASKED, "chosen": "", "rejected": "x"})
    pairs, counts = load_pairs([path], PreferenceFiles(on_error="skip"), OURS, 64)
    assert len(pairs) == 1
    assert "skipped: 1 of 2 rows (50.0%), empty answer: 1" in str(counts)


def test_columns_of_other_names(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"q": ASKED, "good": BETTER, "bad": WORSE})
    files = PreferenceFiles(prompt_column="q", chosen_column="good", rejected_column="bad")
    (pair,) = read_pairs([path], files, PairCounts(64))
    assert [m["content"] for m in pair.chosen.messages] == [ASKED, BETTER]
    assert pair.shared == 1


def pairs_of(tmp_path: Path, count: int, questions: int) -> Pairs:
    rows = [
        {
            "prompt": f"q {i % questions}",
            "chosen": f"yes{i}{'!' * (i % 7)}",
            "rejected": "no",
        }
        for i in range(count)
    ]
    path = write(tmp_path / "a.jsonl", *rows)
    return load_pairs([path], PreferenceFiles(), OURS, 64)[0]


def test_pairs_with_the_same_question_stay_in_one_part(tmp_path: Path) -> None:
    pairs = pairs_of(tmp_path, 60, 12)
    train, val = pairs.split(0.25, seed=3)
    assert len(train) + len(val) == 60
    assert len(val) == 15
    assert not {*train.questions} & {*val.questions}
    again, _ = pairs.split(0.25, seed=3)
    assert again.fingerprint == train.fingerprint
    assert pairs.split(0.25, seed=4)[0].fingerprint != train.fingerprint
    with pytest.raises(ValueError, match="cannot be divided"):
        pairs_of(tmp_path, 5, 1).split(0.5, 0)


def test_a_batch_has_the_chosen_rows_and_then_the_rejected_ones(tmp_path: Path) -> None:
    rows = PairRows(pairs_of(tmp_path, 10, 10), seed=1, pad_id=0, step=4)
    lengths = torch.from_numpy(rows.pairs.examples.lengths).float()
    rows.reference = lengths.view(-1, 2)
    seen: list[str] = []
    for first in range(0, 10, 2):
        batch = rows.batch(first, 2)
        assert batch.count == 2
        is_target = (batch.targets != IGNORE_INDEX).tolist()
        texts = [learned(*row)[0] for row in zip(batch.targets.tolist(), is_target, strict=True)]
        assert [text[13:15] for text in texts] == ["ye", "ye", "no", "no"]
        assert batch.reference is not None
        assert batch.reference.tolist() == ((batch.inputs != 0).sum(1) + 1).tolist()
        assert batch.tokens == int((batch.inputs != 0).sum())
        seen += texts[:2]
    assert len({*seen}) == 10


def test_a_prompt_is_computed_once_for_both_answers(tmp_path: Path) -> None:
    pairs = pairs_of(tmp_path, 10, 10)
    separate, shared = (PairRows(pairs, seed=1, pad_id=0, step=4, shared=x) for x in (False, True))
    separate.reference = shared.reference = -torch.rand(10, 2)
    torch.manual_seed(0)
    size = dict(n_layer=1, n_head=2, n_embd=16, context_length=64)
    model = GPTModel(ModelConfig(**size, vocab_size=OURS.tokenizer.vocab_size))
    add_noise(model, 0.2)
    loss, found = PreferenceLoss("sigmoid", 0.1), []
    for rows in (separate, shared):
        batch = rows.batch(0, 4)
        summed, metrics = loss(model, batch)
        gradients = torch.autograd.grad(summed, [*model.parameters()])
        found.append([summed.detach(), *metrics.values(), *gradients])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))
    assert separate.batch(0, 4).same_as is None
    assert batch.same_as is not None
    computed = len(batch.same_as[batch.same_as >= 0].unique())
    prompts = sum(
        int((pairs.examples[2 * i].labels == IGNORE_INDEX).sum())
        for i in (shared.item(j) for j in range(4))
    )
    assert computed <= batch.tokens - prompts
    shared.fixed = True  # compiled for one shape
    assert shared.batch(0, 4).same_as is None


def test_each_step_is_sorted_by_length_and_each_epoch_complete(tmp_path: Path) -> None:
    rows = PairRows(pairs_of(tmp_path, 10, 10), seed=1, pad_id=0, step=4)
    for epoch in (0, 10):
        assert sorted(rows.item(epoch + i) for i in range(10)) == [*range(10)]
    sizes = [int(rows.lengths[rows.item(i)]) for i in range(8)]
    assert sizes[:4] == sorted(sizes[:4])
    assert sizes[4:] == sorted(sizes[4:])
    assert sorted(i for group in rows.groups(3) for i in group) == [*range(10)]
    assert len([i for group in rows.groups(3, rows.pairs.tokens // 2) for i in group]) == 5


def test_public_sets_are_read_whole() -> None:
    """LLaMA-Factory's demo and a set of instructions, in the folder of complete data sets."""
    sizes = {
        "chat_llamafactory/dpo_en_demo.json": 1_575_286,
        "instruction_data/instruction-data-with-preference.json": 386_968,
    }
    folder = complete_data(sizes)
    demo, instructions = (
        load_pairs([folder / name], PreferenceFiles(), OURS, 8192) for name in sizes
    )
    assert (len(demo[0]), demo[1].left_out.total) == (300, 0)
    assert (len(instructions[0]), instructions[1].left_out.counts()) == (
        1094,
        {"with equal answers": 6},
    )
