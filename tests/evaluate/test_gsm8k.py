"""GSM8K: answer extraction as in lm-evaluation-harness, prompts that fit, scores, files."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from data_sets import complete_data

from gptsmith.chat_template.template import CHAT_TOKENS, TEMPLATE
from gptsmith.evaluate import gsm8k
from gptsmith.evaluate.gsm8k import Problem, flexible, load, score, strict
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = Tokenizer.byte().add_special_tokens(CHAT_TOKENS)
TRAIN = [Problem(f"{n} and 1?", f"So\n#### {n + 1}") for n in range(3)]
TEST = [Problem("4 and 1?", "So\n#### 5"), Problem("5 and 1?", "So\n#### 6")]
ANSWER = " So\n#### 5\n\n"  # to every question: correct once


def write(folder: Path, **splits: list[Problem]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, problems in splits.items():
        rows = (json.dumps({"question": p.question, "answer": p.answer}) for p in problems)
        (folder / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return write(tmp_path / "gsm8k", train=TRAIN, test=TEST)


def tiny(context: int) -> GPTModel:
    torch.manual_seed(0)
    V = TOKENIZER.vocab_size
    return GPTModel(
        ModelConfig(n_layer=1, n_head=2, n_embd=32, context_length=context, vocab_size=V)
    ).eval()


@pytest.fixture(scope="module")
def model() -> GPTModel:
    """Trained to write ANSWER after every prompt."""
    model = tiny(160)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for n in range(80):
        asked = [f"Question: {(n + i) % 10} and 1?\nAnswer:{ANSWER}" for i in range(4)]
        ids = torch.tensor(TOKENIZER.encode("".join(asked)))
        loss = F.cross_entropy(model(ids[None, :-1])[0], ids[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


# --- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "after_hashes", "last"),
    [
        ("so 3 and 4.\n#### 7", "7", "7"),
        ("#### 1,234.50 dollars, or 9", "1,234.50", "9"),
        ("It costs $1,200.", gsm8k.INVALID, "$1,200."),
        ("#### -5", "-5", "-5"),
        ("####7", gsm8k.INVALID, "7"),
        ("none", gsm8k.INVALID, gsm8k.INVALID),
        ("", gsm8k.INVALID, gsm8k.INVALID),
    ],
)
def test_numbers(text, after_hashes, last):
    assert strict(text) == after_hashes
    assert flexible(text) == last


@pytest.mark.parametrize("count", [60, 1319])
def test_every_reference_solution_is_correct(count, real_data):
    sizes = {"eval/gsm8k/test.jsonl": 749_738, "eval/gsm8k/train.jsonl": 4_166_206}
    folder = real_data if count == 60 else complete_data(sizes)
    problems, examples = load(folder / "eval" / "gsm8k")
    assert len(problems) == count
    assert len(examples) == 5
    for problem in problems:
        number = gsm8k._plain(problem.answer)
        assert re.fullmatch(r"-?[0-9.]+", number)
        assert gsm8k._plain(strict(problem.answer)) == number
        assert gsm8k._plain(flexible(problem.answer)) == number


def test_scoring_equals_lm_evaluation_harness(real_data):
    """Real solutions, truncated and changed, against their own and other answers."""
    yaml = pytest.importorskip("yaml")
    import lm_eval
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    text = (Path(lm_eval.__file__).parent / "tasks/gsm8k/gsm8k.yaml").read_text()
    task = yaml.safe_load(text)
    assert task["doc_to_text"] == "Question: {{question}}\nAnswer:"
    assert tuple(task["generation_kwargs"]["until"]) == gsm8k.STOP
    assert task["num_fewshot"] == gsm8k.SHOTS
    [metric] = task["metric_list"]
    filters = {
        f["name"]: RegexFilter(**{k: v for k, v in f["filter"][0].items() if k != "function"})
        for f in task["filter_list"]
    }
    problems, _ = load(real_data / "eval" / "gsm8k")
    for n, problem in enumerate(problems):
        solution = problem.answer
        written = [
            solution, f"{solution}.", f"{solution} dollars", solution.replace("#### ", "#### $"),
            solution[: -len(solution) // 3], problem.question, solution.split("#### ")[1],
            problems[n - 1].answer, f"{solution}\n#### 3", "", "$ , .",
        ]  # fmt: skip
        for name, ours in (("strict-match", strict), ("flexible-extract", flexible)):
            found = [f[0] for f in filters[name].apply([[w] for w in written], [{}])]
            for text, theirs in zip(written, found, strict=True):
                assert ours(text) == theirs
                right = exact_match_hf_evaluate(
                    [theirs], [solution], regexes_to_ignore=metric["regexes_to_ignore"],
                    ignore_case=metric["ignore_case"],
                )["exact_match"]  # fmt: skip
                assert (gsm8k._plain(ours(text)) == gsm8k._plain(solution)) == bool(right)


# --- answers -------------------------------------------------------------------------------------


def test_base_model_reads_examples_and_stops_before_the_next_question(model):
    result = score(model, TOKENIZER, None, TEST, TRAIN, max_new_tokens=30)
    assert [item["generated"] for item in result.items] == [ANSWER] * 2
    assert dict(result.metrics) == {"strict": 0.5, "flexible": 0.5}
    assert result.stderr["strict"] == pytest.approx(0.5)
    assert [item["answer"] for item in result.items] == ["5", "6"]
    assert [item["strict"] for item in result.items] == [True, False]
    json.dumps(result.fields() | {"items": result.items}, allow_nan=False)


def test_prompt_is_that_of_the_harness_with_fixed_examples():
    ids, shots = gsm8k._prompt(TOKENIZER, None, TEST[0], TRAIN[:2], 1000)
    assert shots == 2
    assert TOKENIZER.decode(ids) == (
        "Question: 0 and 1?\nAnswer: So\n#### 1\n\nQuestion: 1 and 1?\nAnswer: So\n#### 2\n\n"
        "Question: 4 and 1?\nAnswer:"
    )


def test_questions_and_examples_with_unknown_characters_are_left_out_and_counted():
    known = Tokenizer.char(["Question: and 0123456789?\nAnswer: So\n#### 5"])
    torch.manual_seed(0)
    model = GPTModel(
        ModelConfig(n_layer=1, n_head=2, n_embd=16, context_length=160, vocab_size=known.vocab_size)
    )
    pounds = Problem("£4 and 1?", "So\n#### 5")
    result = score(model, known, None, [pounds, *TEST], [*TRAIN, pounds], max_new_tokens=8)
    assert [item["id"] for item in result.items] == ["2", "3"]
    assert [item["shots"] for item in result.items] == [3, 3]
    first, second = result.notes
    assert first.startswith("gsm8k: 1 of 3 questions are left out: the tokenizer cannot encode")
    assert "character '£'" in first
    assert first.endswith("(33%: 1)")
    assert second.startswith("gsm8k: 1 of 4 examples are left out: the tokenizer cannot encode")
    with pytest.raises(ValueError, match=r"1 of 1 questions are left out: .*'£'"):
        score(model, known, None, [pounds])


def test_examples_that_do_not_fit_are_left_out_with_a_note():
    # a question takes 27 bytes and an example 38: of 110 tokens, 30 are for the answer
    result = score(tiny(110), TOKENIZER, None, TEST, TRAIN, max_new_tokens=30)
    assert [item["shots"] for item in result.items] == [1, 1]
    assert "2 of 2 questions were asked with fewer than 3 examples (1 to 1)" in result.notes[0]


def test_question_that_does_not_fit_is_wrong_with_a_note():
    long = Problem("5" * 90, "#### 5")
    result = score(tiny(64), TOKENIZER, None, [TEST[0], long], max_new_tokens=8)
    assert result.items[1]["generated"] == ""
    assert not result.items[1]["flexible"]
    assert result.notes == ["1 questions do not fit into 64 tokens and count as wrong"]


def test_chat_model_gets_a_message_and_examples_as_turns(model):
    result = score(model, TOKENIZER, TEMPLATE, TEST, max_new_tokens=8)
    assert [item["shots"] for item in result.items] == [0, 0]
    assert not result.notes
    chat = gsm8k.ChatTemplate(TEMPLATE, TOKENIZER)
    ids, _ = gsm8k._prompt(TOKENIZER, chat, TEST[0], TRAIN[:1], 1000)
    assert TOKENIZER.decode(ids) == (
        "<|user|>0 and 1?<|end|><|assistant|>So\n#### 1<|end|><|user|>4 and 1?<|end|><|assistant|>"
    )


# --- files ---------------------------------------------------------------------------------------


def test_files_are_found_in_a_folder_and_in_the_data_folder(files, tmp_path, monkeypatch):
    assert load(files, shots=2) == (TEST, TRAIN[:2])
    assert load(tmp_path, limit=1, shots=1) == (TEST[:1], TRAIN[:1])
    assert load(files / "test.jsonl", shots=3) == (TEST, TRAIN)
    assert load(files / "train.jsonl", shots=0) == (TRAIN, [])
    write(tmp_path / "data/eval/gsm8k", train=TRAIN, test=TEST)
    monkeypatch.setenv("GPTSMITH_DATA", str(tmp_path / "data"))
    assert load(limit=1) == (TEST[:1], TRAIN)


def test_without_files_and_network_the_error_names_the_files_to_provide(monkeypatch):
    monkeypatch.delenv("GPTSMITH_DATA", raising=False)
    with pytest.raises(OSError, match=r"eval/gsm8k/test.jsonl.*GPTSMITH_DATA") as caught:
        load()
    assert len(str(caught.value)) < 400


def test_white_space_behind_a_reference_is_ignored(model):
    problem = Problem("Add 1 and 2.", "1 + 2 = 3.\n#### 1,203\r\n")
    (item,) = score(model, TOKENIZER, None, [problem], max_new_tokens=8).items
    assert item["answer"] == "1203"


def test_missing_and_bad_files(files, tmp_path):
    (files / "train.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="--shots 0"):
        load(files)
    for answer in ("5", "so #### 5 apples", "so #### five"):  # never equal to a number
        (files / "test.jsonl").write_text(json.dumps({"question": "a", "answer": answer}))
        with pytest.raises(ValueError, match=r"test.jsonl:1: the answer does not end in '#### NUM"):
            load(files, shots=0)
    with pytest.raises(FileNotFoundError, match="nowhere: no such file"):
        load(tmp_path / "nowhere")
    (files / "test.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no problems in it"):
        load(files, shots=0)
