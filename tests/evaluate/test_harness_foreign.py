"""Models from elsewhere score in lm-evaluation-harness as by its own model of transformers."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

import foreign_models
import torch
import transformers

from gptsmith import cli
from gptsmith.evaluate import gsm8k, harness
from gptsmith.run import Run

TEXTS = ("The king sat in the hall.", "A ship came over the sea 🚢 and its sails were grey. " * 6)
PAIRS = [("The king sat", " in the hall"), ("One, two,", " three"), ("", "The queen"),
         ("A ship came ", "in the night"), ("Do not go", "ing")]  # fmt: skip


@pytest.mark.parametrize("kind", ["spm", "llama3", "own_names", "wordpiece", "gpt2"])
def test_scores_and_texts_are_those_of_the_stock_model(kind: str, tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    path = foreign_models.save(kind, tmp_path / "model")
    assert cli.main(["import", str(path), "--out", str(tmp_path / "run")]) == 0
    run = Run.open(tmp_path / "run")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    stock: Any = HFLM(
        pretrained=transformers.AutoModelForCausalLM.from_pretrained(path, dtype="float32"),
        tokenizer=tokenizer, device="cpu", batch_size=1,
    )  # fmt: skip
    ours = harness.lm(run, device="cpu")
    pairs = [p for p in PAIRS if kind != "spm" or p[0]]  # it puts a space before such a text
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    mine, theirs = (lm.loglikelihood(asked) for lm in (ours, stock))
    assert [m[0] for m in mine] == pytest.approx([t[0] for t in theirs], abs=1e-3)
    rolling = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(TEXTS)]
    if run.tokenizer.prefix:  # the harness puts it there twice, and scores one of the two
        ids = tokenizer(TEXTS[0], return_tensors="pt").input_ids
        with torch.no_grad():
            p = stock.model(ids).logits[0, :-1].log_softmax(-1)
        expected = float(p.gather(1, ids[0, 1:, None]).sum())
        assert ours.loglikelihood_rolling(rolling[:1]) == pytest.approx([expected], abs=1e-3)
    else:
        theirs = stock.loglikelihood_rolling(rolling)
        assert ours.loglikelihood_rolling(rolling) == pytest.approx(theirs, abs=1e-3)
    settings = {"until": ["\n\n\n"], "max_gen_toks": 8, "do_sample": False}
    tasks = [Instance("generate_until", {}, (t, settings), i) for i, t in enumerate(TEXTS[:1])]
    # The stock tokenizer decodes a continuation as if it were a whole text: "##or".
    assert [t.lstrip() for t in ours.generate_until(tasks)] == [
        t.lstrip().removeprefix("##") for t in stock.generate_until(tasks)
    ]
    problem = gsm8k.Problem("How many riders?", "Three and four. #### 7")
    prompt, _ = gsm8k._prompt(run.tokenizer, None, problem, (), 64)
    assert prompt == tokenizer("Question: How many riders?\nAnswer:").input_ids
