"""Losses and gradients of preferences beside TRL, for the same model, reference and pairs."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import tokenizers
import torch
from hf_models import TOKENIZER, save, transformers_model
from random_weights import randomize
from runs import imported_model
from transformers import PreTrainedTokenizerFast

from gptsmith.batch import IGNORE_INDEX, PairBatch
from gptsmith.data.examples import Example
from gptsmith.data.packing import fill_batch
from gptsmith.interop.hf import open_folder
from gptsmith.model.gpt import GPTModel
from gptsmith.train.preference import PreferenceLoss, answer_log_probs

trl = pytest.importorskip("trl")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # TRL's, accelerate's and those of transformers' Trainer
    pytest.mark.usefixtures("one_thread"),
]

ROWS = [
    {"prompt": "12345", "chosen": "6789:;", "rejected": "876"},
    {"prompt": "ABC", "chosen": "DE", "rejected": "XYZ[]^_`abc"},
    {"prompt": "abcdefgh", "chosen": "ijklmn", "rejected": "nmlkji"},
]


def ours_of(theirs: Any, folder: Path) -> GPTModel:
    return imported_model(open_folder(save(theirs, folder)))


def batch_of(rows: Any) -> PairBatch:
    """Our batch of pairs that TRL has tokenized."""
    examples = []
    for side in ("chosen_ids", "rejected_ids"):
        for row in rows:
            ids = torch.tensor(row["prompt_ids"] + row[side], dtype=torch.int32).numpy()
            labels = ids.copy()
            labels[: len(row["prompt_ids"])] = IGNORE_INDEX
            examples.append([Example(ids, labels, side)])
    width = max(len(example.ids) - 1 for (example,) in examples)
    batch = fill_batch(examples, width, 0, packed=False)
    return PairBatch(batch.inputs, batch.targets, count=len(rows))


@pytest.mark.parametrize("case", ["gpt2", "llama"])
@pytest.mark.parametrize(("kind", "beta"), [("sigmoid", 0.1), ("ipo", 0.2), ("sigmoid_norm", 2.0)])
def test_loss_and_gradients_equal_those_of_its_dpo_trainer(
    kind: Any, beta: float, case: str, tmp_path: Path
) -> None:
    theirs, reference = transformers_model(case), transformers_model(case)
    randomize(reference, seed=7)
    reference_of_ours = ours_of(reference, tmp_path / "reference")
    eos = TOKENIZER.decode([TOKENIZER.eos_id])
    words = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(TOKENIZER.to_json()),
        eos_token=eos, pad_token=eos,
    )  # fmt: skip
    trainer = trl.DPOTrainer(
        theirs, reference, processing_class=words, train_dataset=datasets.Dataset.from_list(ROWS),
        args=trl.DPOConfig(
            str(tmp_path / "trainer"), loss_type=[kind], beta=beta, report_to=[], use_cpu=True,
            bf16=False, gradient_checkpointing=False, disable_dropout=True,
        ),
    )  # fmt: skip
    rows = [dict(row) for row in trainer.train_dataset]
    expected = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    expected.backward()
    grads = {name: p.grad.clone() for name, p in theirs.named_parameters()}

    theirs.zero_grad()
    ours, batch = ours_of(theirs, tmp_path / "model"), batch_of(rows)
    with torch.no_grad():
        batch = replace(batch, reference=answer_log_probs(reference_of_ours, batch))
    loss = PreferenceLoss(kind, beta)(ours, batch)[0] / batch.count
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert abs(float(loss.detach()) - 0.6931) > 1e-3  # the reference is another model

    theirs.load_state_dict(grads, strict=False)  # in our layout, as if they were weights
    moved = dict(ours_of(theirs, tmp_path / "gradients").named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, moved[name].detach(), rtol=1e-4, atol=1e-5, msg=name
        )


@pytest.mark.parametrize("smooth", [0.0, 0.2])
def test_simpo_equals_the_loss_of_its_cpo_trainer(smooth: float, tmp_path: Path) -> None:
    from trl.experimental.cpo import CPOTrainer

    ours = ours_of(transformers_model("llama"), tmp_path / "model")
    tokenized = [
        {f"{name}_ids": TOKENIZER.encode(text) for name, text in row.items()} for row in ROWS
    ]
    batch = batch_of(tokenized)
    loss = PreferenceLoss("simpo", 2.5, label_smoothing=smooth, gamma=0.7)(ours, batch)[0]
    lengths = (batch.targets != IGNORE_INDEX).sum(1)
    means = answer_log_probs(ours, batch) / lengths
    settings = SimpleNamespace(
        loss_type="simpo", simpo_gamma=0.7, beta=2.5, label_smoothing=smooth, alpha=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    expected, *_ = CPOTrainer.cpo_loss(settings, *means.chunk(2))
    torch.testing.assert_close(loss, expected.sum(), rtol=1e-5, atol=1e-5)
