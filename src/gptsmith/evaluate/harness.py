"""Our runs as models of EleutherAI's lm-evaluation-harness (extra `eval`), for all its tasks.

    lm_eval.simple_evaluate(model=harness.lm("runs/mine"), tasks=["hellaswag", "boolq"])
    python -m gptsmith.evaluate.harness --model gptsmith --model_args run=runs/mine --tasks boolq

The second line is the harness's own command, with our model registered.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gptsmith import terminal
from gptsmith.evaluate.likelihood import Request, encode_pairs, log_likelihoods
from gptsmith.generate.engine import Engine
from gptsmith.generate.options import SamplingConfig
from gptsmith.run import CheckpointName, Run

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM

_TOKENS = 256  # generated where a task sets no limit, as in the harness's own models


def lm(
    run: str | Path | Run,
    checkpoint: CheckpointName = "last",
    device: str = "auto",
    trust_code: bool = False,
) -> LM:
    """The run as an LM for `simple_evaluate(model=...)`; the arguments are those of load_model.

    ValueError where lm-eval is not installed.
    """
    return _model_class()(run, checkpoint, device, trust_code)


class _RunRequests:
    """The requests of the harness, answered by a run. `_model_class` adds the harness's own class.

    batch_size and max_batch_size are ignored: batches are sized by tokens.
    """

    cache_hook: Any  # of the harness's class: stores what has been computed

    def __init__(
        self,
        run: str | Path | Run,
        checkpoint: CheckpointName = "last",
        device: str = "auto",
        trust_code: bool = False,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        run = run if isinstance(run, Run) else Run.open(run)
        if device == "cuda:0" and not torch.cuda.is_available():
            device = "auto"  # the default of the harness's command is cuda:0
        self.tokenizer = run.tokenizer
        self.model = run.load_model(checkpoint, device, trust_code)
        if not self.tokenizer.special_ids.start_ids:
            raise ValueError(
                f"{run.path}: nothing says which token begins or ends a text: import the model"
                " again with --eos-token NAME"
            )
        self._first = self.tokenizer.special_ids.start_ids[-1]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        pairs = [request.args for request in requests]
        found = log_likelihoods(
            self.model,
            encode_pairs(self.tokenizer, pairs),
            self.tokenizer.vocab_size,
            title="likelihoods",
        )
        for pair, likelihood in zip(pairs, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, tuple(likelihood))
        return [(likelihood.nats, likelihood.greedy) for likelihood in found]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Texts of any length, in windows of the model's context; each token is predicted once."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows: list[Request] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            for part in get_rolling_token_windows(
                token_list=self.tokenizer.encode(request.args[0]),
                prefix_token=self._first,
                max_seq_len=self.model.config.context_length,
                context_len=1,
            ):
                windows.append(Request(*make_disjoint_window(part)))
                owners.append(i)
        sums = [0.0] * len(requests)
        found = log_likelihoods(
            self.model, windows, self.tokenizer.vocab_size, title="windows of text"
        )
        for i, likelihood in zip(owners, found, strict=True):
            sums[i] += likelihood.nats
        for request, nats in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, nats)
        return sums

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Requests with equal settings run together; contexts are truncated on the left."""
        from lm_eval.models.utils import normalize_gen_kwargs

        groups: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(i)
        written = [""] * len(requests)
        limit = self.model.config.context_length
        for members in groups.values():
            settings = normalize_gen_kwargs(requests[members[0]].args[1], _TOKENS)
            room = max(limit - settings["max_gen_toks"], limit // 2)
            sampling = ("top_k", "top_p", "min_p", "repetition_penalty")
            config = SamplingConfig(
                max_new_tokens=settings["max_gen_toks"],
                temperature=settings.get("temperature", 1.0 if settings["do_sample"] else 0.0),
                **{name: settings[name] for name in sampling if name in settings},
            )
            prompts = [self.tokenizer.prompt(requests[i].args[0])[-room:] for i in members]
            stop = [text for text in settings["until"] if text]
            found = Engine(self.model, self.tokenizer).generate(prompts, config, stop=stop)
            for i, generation in zip(members, found, strict=True):
                written[i] = generation.text
                self.cache_hook.add_partial("generate_until", requests[i].args, written[i])
        return written


@cache
def _model_class() -> type[LM]:
    """The class, made on demand because its base class is in an optional package."""
    try:
        from lm_eval.api.model import LM
    except ImportError:
        raise ValueError(
            "lm-evaluation-harness is not installed: pip install 'gptsmith[eval]'"
        ) from None

    class GPTSmithLM(_RunRequests, LM):
        pass

    return GPTSmithLM


def register() -> None:
    """Register the model for simple_evaluate(model="gptsmith", model_args="run=...")."""
    made = _model_class()
    from lm_eval.api.registry import model_registry

    model_registry.register("gptsmith", target=made)


def main() -> None:
    """The harness's command with our model registered."""
    try:
        register()
    except ValueError as error:
        terminal.note(f"error: {error}")
        sys.exit(1)
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
