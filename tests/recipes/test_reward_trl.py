"""Losses and gradients of rewards beside TRL, for the same completions and their rewards."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tokenizers
import torch
from hf_models import TOKENIZER, save, transformers_model
from random_weights import randomize
from runs import imported_model
from transformers import PreTrainedTokenizerFast

from gptsmith.data.prompts import EncodedPrompt, Prompt
from gptsmith.interop.hf import open_folder
from gptsmith.model.gpt import GPTModel
from gptsmith.recipes.policy import Completion, Policy
from gptsmith.recipes.reward import log_probs_by
from gptsmith.recipes.reward_options import RewardConfig
from gptsmith.recipes.rollouts import Rollouts, RolloutSampler, Scored
from gptsmith.train.policy_loss import PolicyLoss
from gptsmith.train.runtime import Precision

trl = pytest.importorskip("trl")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # TRL's, accelerate's and those of transformers' Trainer
    pytest.mark.usefixtures("one_thread"),
]

G, NEW = 3, 8
PROMPTS = ["12345", "ABCDEFGH", "de"]
ANSWERS = ["6789", "87", "9", "DEFGHIJK", "XYZ", "abc", "ij", "kl", "mnabcd"]
REWARDS = [1.0, 0.0, 0.0, 0.2, 0.9, 0.4, 1.0, 1.0, 1.0]  # the last group teaches nothing


def ours_of(theirs: Any, folder: Path) -> GPTModel:
    return imported_model(open_folder(save(theirs, folder)))


class Recorded(RolloutSampler):
    """The same completions and rewards each time."""

    def __call__(self, prompts: Any, sampling: Any, seeds: Any) -> Scored:
        found = [EncodedPrompt(_prompt(text), TOKENIZER.encode(text)) for text in PROMPTS]
        completions = [Completion(TOKENIZER.encode(text), text, True) for text in ANSWERS]
        return Scored(found, completions, np.array(REWARDS)[:, None])


def _prompt(text: str) -> Prompt:
    return Prompt([{"role": "user", "content": text}], None, {}, text)


def rollouts(model: GPTModel, reference: GPTModel | None, **options: Any) -> Rollouts:
    config = RewardConfig(
        **{"from": "base", "out": "out"}, data=["x"], prompts_per_step=len(PROMPTS), group_size=G,
        max_new_tokens=NEW, train={"batch_size": 4}, **options,
    )  # fmt: skip
    prompts = [EncodedPrompt(_prompt(text), TOKENIZER.encode(text)) for text in PROMPTS]
    found = Rollouts(config, prompts, 32, pad_id=0)
    sampler = Recorded(Policy(model, TOKENIZER, [], 32), {"given": lambda samples: []}, [1.0])
    temperature = config.temperature
    log_probs = log_probs_by(Precision("fp32", "cpu", ""), temperature)
    found.attach(sampler, log_probs, None if reference is None else lambda: reference)
    return found


def padded(texts: list[str], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [TOKENIZER.encode(text) for text in texts]
    longest = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.int64)
    for i, row in enumerate(rows):
        at = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[i, at], mask[i, at] = torch.tensor(row), 1
    return ids, mask


@pytest.mark.parametrize(
    ("normalize", "loss_type", "kl", "old", "temperature"),
    [
        ("token", "dapo", 0.0, False, 1.0),
        ("token", "dapo", 0.0, False, 0.8),
        ("token", "dapo", 0.2, True, 1.0),
        ("sequence", "grpo", 0.1, True, 1.0),
        ("constant", "dr_grpo", 0.0, True, 1.0),
    ],
)
def test_loss_and_gradients_equal_those_of_its_grpo_trainer(
    normalize: Any, loss_type: str, kl: float, old: bool, temperature: float, tmp_path: Path
) -> None:
    theirs, others = transformers_model("llama"), transformers_model("llama")
    eos = TOKENIZER.decode([TOKENIZER.eos_id])
    words = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(TOKENIZER.to_json()),
        eos_token=eos, pad_token=eos,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        theirs, reward_funcs=lambda **_: [], processing_class=words,
        train_dataset=datasets.Dataset.from_list([{"prompt": text} for text in PROMPTS]),
        args=trl.GRPOConfig(
            str(tmp_path / "trainer"), loss_type=loss_type, beta=0.0, epsilon=0.2,
            epsilon_high=0.28, temperature=temperature, max_completion_length=NEW,
            num_generations=G, per_device_train_batch_size=9, report_to=[], use_cpu=True,
            bf16=False, gradient_checkpointing=False, use_bias_correction_kl=False,
        ),
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    trainer.beta = kl  # above 0 at first, it would look for a reference model by its name
    prompt_ids, prompt_mask = padded([p for p in PROMPTS for _ in range(G)], left=True)
    completion_ids, completion_mask = padded(ANSWERS, left=False)
    groups = torch.tensor(REWARDS).view(-1, G)
    advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    inputs = {
        "prompt_ids": prompt_ids, "prompt_mask": prompt_mask, "completion_ids": completion_ids,
        "completion_mask": completion_mask, "advantages": advantages.flatten(),
        "num_items_in_batch": completion_mask.sum(),
    }  # fmt: skip

    def log_probs(model: Any) -> torch.Tensor:
        with torch.no_grad():
            found, *_ = trainer._get_per_token_logps_and_entropies(
                model, torch.cat([prompt_ids, completion_ids], 1),
                torch.cat([prompt_mask, completion_mask], 1), completion_ids.size(1),
            )  # fmt: skip
        return found

    before = {name: p.clone() for name, p in theirs.state_dict().items()}
    randomize(others, seed=7)
    reference = ours_of(others, tmp_path / "reference") if kl else None
    if kl:
        theirs.load_state_dict(others.state_dict())
        inputs["ref_per_token_logps"] = log_probs(theirs)
    for p in others.parameters():  # the policy that wrote the completions is near the present one
        p.data = p.data * 0
    others.load_state_dict({n: p + 0.02 * torch.randn_like(p) for n, p in before.items()})
    if old:
        theirs.load_state_dict(others.state_dict())
        inputs["old_per_token_logps"] = log_probs(theirs)
    theirs.load_state_dict(before)
    trainer.model.train()
    expected = trainer._compute_loss(trainer.model, inputs)
    expected.backward()
    grads = {name: p.grad.clone() for name, p in theirs.named_parameters()}

    theirs.zero_grad()
    ours = ours_of(theirs, tmp_path / "model")
    sampled_by = ours_of(others, tmp_path / "old") if old else ours
    found = rollouts(
        sampled_by, reference, normalize=normalize, kl=kl, temperature=temperature,
        updates=2 if old else 1,
    )  # fmt: skip
    batches = found.micro_batches(0)
    loss = PolicyLoss(0.2, 0.28, kl, temperature)
    count = sum(batch.count for batch in batches)
    total = sum(loss(ours, batch)[0] for batch in batches) / count
    total.backward()
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    theirs.load_state_dict(grads, strict=False)  # in our layout, as if they were weights
    moved = dict(ours_of(theirs, tmp_path / "gradients").named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, moved[name].detach(), rtol=1e-4, atol=1e-5, msg=name
        )
