"""The data of reinforcement learning: completions of prompts by the policy, their rewards and
advantages, as micro-batches. They depend on weights, seed and step alone.

P prompts of a step, G completions of each, R = P * G rows, K rewards, T positions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptsmith.batch import IGNORE_INDEX, Batch, PolicyBatch
from gptsmith.data.order import EpochOrder, Epochs
from gptsmith.data.prompts import EncodedPrompt
from gptsmith.data.same_prefixes import same_prefixes
from gptsmith.evaluate.rewards import Reward, Sample
from gptsmith.generate.options import SamplingConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.recipes.micro_batches import micro_batches
from gptsmith.recipes.policy import Completion, Policy
from gptsmith.recipes.reward_options import RewardConfig
from gptsmith.train import distributed, sharding
from gptsmith.train.step import derive_seed

_MULTIPLE = 16  # padded lengths are rounded up to this: fewer shapes

LogProbs = Callable[[GPTModel, PolicyBatch], Tensor]
"""Log-probabilities of a batch's targets (B, T), on the CPU, without gradients."""


@dataclass(frozen=True)
class Scored:
    """Completions in rows, those of a prompt adjacent, and their rewards (R, K)."""

    prompts: Sequence[EncodedPrompt]
    completions: Sequence[Completion]
    rewards: np.ndarray


class RolloutSampler:
    """Completes prompts by the policy and rewards the completions. With several ranks, each does
    its share of the prompts, and all get all of them.

    rewards: by name. weights: of each in the total.
    """

    def __init__(
        self, policy: Policy, rewards: Mapping[str, Reward], weights: Sequence[float]
    ) -> None:
        self.policy, self.rewards, self.weights = policy, rewards, np.array(weights)

    def __call__(
        self,
        prompts: Sequence[EncodedPrompt],
        sampling: SamplingConfig,
        seeds: Sequence[Sequence[int]],
    ) -> Scored:
        """One completion for each of the seeds of each prompt, by the weights of the last
        `policy.refresh`."""
        rank, ranks = distributed.rank(), distributed.world_size()
        share = range(rank, len(prompts), ranks)
        groups = self.policy.complete(
            [prompts[i].ids for i in share], sampling, [seeds[i] for i in share]
        )
        samples = [
            Sample(prompts[i].prompt, completion.text, len(completion.ids))
            for i, group in zip(share, groups, strict=True)
            for completion in group
        ]
        columns = [reward(samples) for reward in self.rewards.values()]
        values = zip(*columns, strict=True)
        own: list[list[Any]] = [
            [[*completion, next(values)] for completion in group] for group in groups
        ]
        found = distributed.from_all(own)
        rows = [row for i in range(len(prompts)) for row in found[i % ranks][i // ranks]]
        completions = [Completion(ids, text, finished) for ids, text, finished, _ in rows]
        rewards = np.array([row[-1] for row in rows], np.float64)
        return Scored(prompts, completions, rewards.reshape(len(rows), len(self.rewards)))

    def total(self, rewards: np.ndarray) -> np.ndarray:
        """The weighted sum (R,) of rewards (R, K)."""
        return rewards @ self.weights

    def means(self, rewards: np.ndarray) -> dict[str, float]:
        """The mean total, and those of the rewards where there are several."""
        names = [metric_name(name) for name in self.rewards] if len(self.rewards) > 1 else []
        each = zip(names, rewards.mean(axis=0).tolist(), strict=False)
        return {"reward": float(self.total(rewards).mean()), **dict(each)}


def metric_name(name: str) -> str:
    """The name of a reward's mean among the metrics: regex:a+b -> reward_regex_a_b."""
    return "reward_" + "_".join("".join(c if c.isalnum() else " " for c in name).split())


def group_advantages(rewards: np.ndarray, G: int, scale: bool) -> np.ndarray:
    """Rewards (R,) minus the mean of their group, divided by its standard deviation if `scale`.

    Shao et al. 2024, "DeepSeekMath" (GRPO); without the division Liu et al. 2025, "Understanding
    R1-Zero-Like Training" (Dr. GRPO). The standard deviation is that of a sample (n - 1), plus
    1e-4, as in TRL.
    """
    groups = rewards.reshape(-1, G)
    found = groups - groups.mean(axis=1, keepdims=True)
    if scale:
        found = found / (groups.std(axis=1, ddof=1, keepdims=True) + 1e-4)
    found[np.ptp(groups, axis=1) == 0] = 0  # whatever rounding leaves of equal rewards
    return found.reshape(-1)


def prefix_advantages(
    advantages: np.ndarray, ids: Sequence[Sequence[int]], G: int
) -> list[np.ndarray]:
    """The advantages (R,) of completions, credited to the tokens (lengths of `ids`) that made them.

    The value of a prefix is the mean over the completions of the group that begin with it. A token
    gets the value with it minus the value without it, so what good and bad completions share gets
    little, and where they part, the difference; the sum over a row is its advantage. Kazemnejad et
    al. 2024, "VinePPO", estimate the same values by new samples from each prefix.
    """
    found = []
    for first in range(0, len(ids), G):
        nodes: dict[tuple[int, int], int] = {}  # (prefix, next token) -> the longer prefix
        values: list[list[float]] = [[]]  # of the completions with each prefix; 0 is the empty one
        paths = []
        for row in range(first, first + G):
            path = [0]
            for token in ids[row]:
                path.append(nodes.setdefault((path[-1], token), len(values)))
                if path[-1] == len(values):
                    values.append([])
            for node in path:
                values[node].append(advantages[row])
            paths.append(path)
        means = np.array([np.mean(each) for each in values])
        found += [np.diff(means[path]) for path in paths]
    return found


class Rollouts(Epochs):
    """The micro-batches of a step, whose completions are sampled when it begins; with several
    updates, those of the following steps are the same.

    Rows of a prompt are adjacent, so that a micro-batch computes it once; under a mask that does
    not permit this, rows are sorted by length, for little padding. Groups without variance have no
    gradient and are left out, unless a KL penalty asks for them. Equal completions of a
    prompt are one row, which counts as often as they were sampled: there is no dropout, so their
    gradients are equal.
    """

    def __init__(
        self, config: RewardConfig, prompts: Sequence[EncodedPrompt], T: int, pad_id: int
    ) -> None:
        self.config, self.prompts, self.T, self.pad_id = config, prompts, T, pad_id
        self.P, self.G = config.prompts_per_step, config.group_size
        super().__init__(len(prompts) * self.G * config.updates, config.train.seed)
        self.rollout: Scored | None = None
        """The present one; None before the first step."""
        self._order = EpochOrder(len(prompts), config.train.seed)
        self._sampling = SamplingConfig(
            temperature=config.temperature, max_new_tokens=config.max_new_tokens
        )
        self._number = -1  # of the rollout
        self._old: dict[int, list[float]] = {}  # by row
        self._saved: tuple[int, Scored, dict[int, list[float]]] | None = None
        self._batches: list[Batch] = []  # of this rank
        self._began = self._seconds = 0.0

    def attach(
        self,
        sampler: RolloutSampler,
        log_probs: LogProbs,
        reference: Callable[[], GPTModel] | None = None,
    ) -> None:
        """What `micro_batches` needs. reference: the model of the KL penalty, asked for in each
        rollout."""
        self.sampler, self._log_probs, self._reference = sampler, log_probs, reference

    def micro_batches(self, step: int) -> Sequence[Batch]:
        """This rank's micro-batches of a step. All ranks ask for the same one."""
        number = step // self.config.updates
        if number == self._number:
            return self._batches
        self._began = time.perf_counter()
        policy = self.sampler.policy
        with sharding.gathered(policy.model):
            if self._saved is not None and self._saved[0] == number:
                _, rollout, self._old = self._saved
            else:
                policy.refresh()
                seeds = [
                    [derive_seed(self.seed, number, i, g) for g in range(self.G)]
                    for i in range(self.P)
                ]
                rollout = self.sampler(self._prompts(number), self._sampling, seeds)
                self._old = {}
            self._saved = None
            self._seconds = time.perf_counter() - self._began
            self._use(rollout)
        self._number = number
        return self._batches

    def metrics(self) -> dict[str, float]:
        """Measurements of the present rollout, by name."""
        assert self.rollout is not None
        rewards, completions = self.rollout.rewards, self.rollout.completions
        groups = self.sampler.total(rewards).reshape(-1, self.G)
        return {
            **self.sampler.means(rewards),
            "reward_std": float(groups.std(axis=1, ddof=1).mean()),
            "no_signal": float((np.ptp(groups, axis=1) == 0).mean()),
            "length": float(np.mean([len(completion.ids) for completion in completions])),
            "truncated": float(np.mean([not completion.finished for completion in completions])),
            "sampling_share": round(self._seconds / (time.perf_counter() - self._began), 4),
        }

    @property
    def _shared(self) -> bool:
        """Whether a prompt is computed once for its completions in a micro-batch."""
        return self.sampler.policy.model.mask.shares_prefixes

    # --- batches

    def batch(self, first: int, count: int) -> PolicyBatch:
        """Rows first..first+count-1 of the present rollout, as they are sorted; one row without
        targets if there are none."""
        rows = self._rows[first : first + count]
        sequences = [(self._prompt(row).ids, self._new_ids(row)) for row in rows]
        lengths = np.array([len(prompt) + len(new) - 1 for prompt, new in sequences] or [1])
        width = min(self.T, -(-int(lengths.max()) // _MULTIPLE) * _MULTIPLE)
        inputs = np.full((max(1, len(rows)), width), self.pad_id, np.int64)
        for row, (prompt, new) in zip(inputs, sequences, strict=False):
            row[: len(prompt) + len(new) - 1] = [*prompt, *new[:-1]]
        places = dict.fromkeys(self._prompt(row).prompt.place for row in rows)
        weights = torch.tensor([self._weights[row] for row in rows] or [0.0], dtype=torch.float32)
        advantages = [self._advantages[row].tolist() for row in rows]
        batch = PolicyBatch(
            torch.from_numpy(inputs),
            self._placed(rows, [new for _, new in sequences], inputs.shape, IGNORE_INDEX),
            name=f"completions of {', '.join([*places][:3])}",
            tokens=int(lengths.sum()) if rows else 0,
            same_as=same_prefixes(inputs, lengths) if self._shared else None,
            advantages=self._placed(rows, advantages, inputs.shape, 0.0),
            weights=weights,
            copies=torch.tensor([self._copies[row] for row in rows] or [1]),
        )
        if self.config.updates > 1:
            if not self._old.keys() >= {*rows}:
                found = self._log_probs(self.sampler.policy.model, batch)
                targets = zip(found, batch.targets != IGNORE_INDEX, strict=True)
                self._old |= zip(rows, (p[at].tolist() for p, at in targets), strict=False)
            old = self._placed(rows, [self._old[row] for row in rows], inputs.shape, 0.0)
            batch = replace(batch, old=old)
        if self._reference_model is not None:
            batch = replace(batch, reference=self._log_probs(self._reference_model, batch))
        return batch

    def _use(self, rollout: Scored) -> None:
        """Make the micro-batches of a rollout."""
        config = self.config
        self.rollout = rollout
        ids = [completion.ids for completion in rollout.completions]
        lengths = np.array([len(each) for each in ids])
        rewards = self.sampler.total(rollout.rewards)
        advantages = group_advantages(rewards, self.G, config.advantages == "scaled")
        if config.credit == "prefix":
            self._advantages = prefix_advantages(advantages, ids, self.G)
        else:
            self._advantages = [np.full(len(i), x) for i, x in zip(ids, advantages, strict=True)]
        used = lengths > 0
        if config.mask_truncated:
            used &= [completion.finished for completion in rollout.completions]
        live = used if config.kl else used & [each.any() for each in self._advantages]
        divisor = {
            "token": np.full(lengths.shape, lengths[used].sum()),
            "sequence": len(lengths) * lengths,
            "constant": np.full(lengths.shape, len(lengths) * config.max_new_tokens),
        }[config.normalize]
        # The step divides by the targets of its batches: those of the live rows.
        self._weights = lengths[live].sum() / np.maximum(1, divisor)
        sizes = np.array([len(self._prompt(row).ids) for row in range(len(lengths))]) + lengths
        rows, self._copies = self._distinct(np.flatnonzero(live))
        if self._shared:  # groups by their longest row
            sizes = sizes.reshape(-1, self.G).max(axis=1).repeat(self.G)
        order = np.lexsort((rows, sizes[rows]))
        self._rows = rows[order].tolist()
        self._reference_model = None if self._reference is None else self._reference()
        self._batches = micro_batches(
            self, 0, max(1, len(self._rows)), config.train.batch_size,
            distributed.rank(), distributed.world_size(),
        )  # fmt: skip

    def _distinct(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The first of equal rows, and how often it is there, for each row of the rollout."""
        first: dict[tuple[int, tuple[int, ...], bytes], int] = {}
        copies = np.zeros(len(self._advantages), np.int64)
        for row in rows.tolist():
            key = row // self.G, (*self._new_ids(row),), self._advantages[row].tobytes()
            copies[first.setdefault(key, row)] += 1
        return np.array([*first.values()], np.int64), copies

    def _placed(
        self,
        rows: Sequence[int],
        values: Sequence[Sequence[float]],
        shape: tuple[int, ...],
        fill: float,
    ) -> Tensor:
        """Values of the new tokens of rows, at the positions that predict them, and `fill`."""
        found = np.full(shape, fill, np.int64 if isinstance(fill, int) else np.float32)
        for b, (row, new) in enumerate(zip(rows, values, strict=True)):
            start = len(self._prompt(row).ids) - 1
            found[b, start : start + len(new)] = new
        return torch.from_numpy(found)

    def _prompts(self, number: int) -> list[EncodedPrompt]:
        first = number * self.P
        return [self.prompts[self._order.item(i)] for i in range(first, first + self.P)]

    def _prompt(self, row: int) -> EncodedPrompt:
        assert self.rollout is not None
        return self.rollout.prompts[row // self.G]

    def _new_ids(self, row: int) -> list[int]:
        assert self.rollout is not None
        return self.rollout.completions[row].ids

    # --- checkpoints

    def state(self, step: int) -> dict[str, Tensor]:
        """What a run that resumes before `step` needs besides weights: the rollout, if its weights
        are gone. All ranks ask for it."""
        if step % self.config.updates == 0 or self.rollout is None:
            return {}
        own: list[Any] = [*self._old.items()]
        old = {row: values for part in distributed.from_all(own) for row, values in part}
        completions, rows = self.rollout.completions, sorted(old)
        return {
            "ids": torch.tensor([i for c in completions for i in c.ids], dtype=torch.int64),
            "lengths": torch.tensor([len(c.ids) for c in completions], dtype=torch.int64),
            "finished": torch.tensor([c.finished for c in completions]),
            "rewards": torch.from_numpy(self.rollout.rewards.copy()),
            "old_rows": torch.tensor(rows, dtype=torch.int64),
            "old": torch.tensor([p for row in rows for p in old[row]], dtype=torch.float32),
        }

    def load_state(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Go on at `step` with what `state` returned there."""
        number, lengths = step // self.config.updates, state["lengths"].tolist()
        prompts, completions = self._prompts(number), []
        ends = zip(state["ids"].split(lengths), state["finished"].tolist(), strict=True)
        for row, (ids, finished) in enumerate(ends):
            new = ids.tolist()
            stream = self.sampler.policy.tokenizer.stream(prompts[row // self.G].ids)
            pieces = [stream.push(token) for token in (new[:-1] if finished else new)]
            completions.append(Completion(new, "".join([*pieces, stream.flush()]), finished))
        rows = state["old_rows"].tolist()
        values = state["old"].split([lengths[row] for row in rows])
        old = {row: p.tolist() for row, p in zip(rows, values, strict=True)}
        rollout = Scored(prompts, completions, state["rewards"].numpy())
        self._saved = number, rollout, old
