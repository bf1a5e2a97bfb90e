"""gptsmith as a library: load a run and use it, or train one, from Python."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from gptsmith.chat_template.template import Message
from gptsmith.config import flatten
from gptsmith.evaluate.options import EvaluateOptions
from gptsmith.generate.options import SamplingConfig
from gptsmith.run import CheckpointName, Run
from gptsmith.run.options import Quantized

if TYPE_CHECKING:
    from gptsmith.evaluate.result import Result
    from gptsmith.generate.chat import Chat
    from gptsmith.generate.engine import Engine
    from gptsmith.model.gpt import GPTModel
    from gptsmith.tokenizer import Tokenizer


class LoadedRun:
    """A run with its model in memory.

        run = gptsmith.load("runs/shakespeare")
        print(run.generate("To be", max_new_tokens=50))

    run        the run folder, as a Run
    model      the model, in eval mode
    tokenizer  its tokenizer
    """

    def __init__(
        self,
        run: Run,
        checkpoint: CheckpointName = "last",
        device: str = "auto",
        trust_code: bool = False,
        quantize: Quantized | None = None,
    ) -> None:
        """Arguments and errors: see `load`."""
        self.run, self.checkpoint = run, checkpoint
        self.device, self.trust_code, self.quantize = device, trust_code, quantize
        self.model: GPTModel = run.load_model(checkpoint, device, trust_code)
        self.tokenizer: Tokenizer = run.tokenizer
        if quantize:
            _ = self.engine  # quantizes them now

    def __repr__(self) -> str:
        return f"LoadedRun({str(self.run.path)!r})"

    @overload
    def generate(
        self, prompts: str = "", *, stop: str | Sequence[str] = (), **sampling: Any
    ) -> str: ...

    @overload
    def generate(
        self, prompts: Sequence[str], *, stop: str | Sequence[str] = (), **sampling: Any
    ) -> list[str]: ...

    def generate(
        self, prompts: str | Sequence[str] = "", *, stop: str | Sequence[str] = (), **sampling: Any
    ) -> str | list[str]:
        """The continuation of one prompt, or of each of several.

        sampling: fields of SamplingConfig (max_new_tokens, temperature, top_k, top_p, seed ...);
        prompt i has the seed `seed + i`. stop: what ends a text and is not part of it, one or more.
        """
        generations = self.engine.generate(prompts, SamplingConfig(**sampling), stop=stop)
        texts = [generation.text for generation in generations]
        return texts[0] if isinstance(prompts, str) else texts

    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        on_text: Callable[[str], None] | None = None,
        **sampling: Any,
    ) -> str:
        """The assistant's reply to a user's message, or to a conversation.

        messages: text, or `{"role": ..., "content": ...}` each, the last one the user's. on_text:
        called with each piece of the reply as it is generated. sampling: see `generate`.
        ValueError for a run that is not a chat model.
        """
        if isinstance(messages, str):
            messages = [Message(role="user", content=messages)]
        return self._chat.reply(messages, SamplingConfig(**sampling), on_text).text

    def evaluate(self, *tasks: str, **options: Any) -> dict[str, Result]:
        """Results by task; by default of "perplexity", or of "classify" for a classifier.

        tasks, options: those of `gptsmith evaluate` (data="FILE", limit=100, task_data="DIR" ...).
        """
        from gptsmith.evaluate import tasks as evaluation

        config = EvaluateOptions(
            run=self.run.path, checkpoint=self.checkpoint, device=self.device,
            trust_code=self.trust_code, tasks=tasks,
            **{"quantize": self.quantize, **options},
        )  # fmt: skip
        results = [job() for job in evaluation.prepare(config, self.run, lambda: self.model)]
        return {result.task: result for result in results}

    @cached_property
    def engine(self) -> Engine:
        """What `generate` and `chat` use. Call `engine.refresh()` after a change of weights."""
        from gptsmith.generate.engine import Engine

        return Engine(self.model, self.tokenizer, weights=self.quantize or "auto")

    @cached_property
    def _chat(self) -> Chat:
        from gptsmith.generate.chat import Chat

        if self.run.chat_template is None:
            raise ValueError(
                f"{self.run.path} is not a chat model: gptsmith.finetune('chat', "
                f"base={str(self.run.path)!r}, ...) makes one, run.generate continues text"
            )
        return Chat(self.model, self.tokenizer, self.run.chat_template, self.engine)


def load(
    path: str | Path,
    checkpoint: CheckpointName = "last",
    device: str = "auto",
    trust_code: bool = False,
    quantize: Quantized | None = None,
) -> LoadedRun:
    """Open a run folder and load its model.

    checkpoint: "last", "best" or a step. device: auto, cpu, cuda, cuda:N or mps. trust_code: allow
    a mask that is Python code in the run folder. quantize: "int8" or "int4", the weights that
    `generate`, `chat` and the tasks of `evaluate` that generate text use; `model` keeps its own.
    ValueError or FileNotFoundError for a path that is not a run, for missing or damaged weights,
    and for quantized weights where the compiled kernels do not serve the model.
    """
    return LoadedRun(Run.open(path), checkpoint, device, trust_code, quantize)


def pretrain(recipe: str | Path | None = None, **fields: Any) -> LoadedRun:
    """Train a model from scratch, as `gptsmith pretrain` does, and load it.

        run = gptsmith.pretrain(data="data/x", out="runs/x", model="tiny", train={"steps": 500})

    recipe: a YAML file. fields: named as in a recipe, which they override; sections are mappings.
    If a signal stops training, the run is saved and loaded as it is. ValueError for whatever the
    command line rejects.
    """
    from gptsmith.commands.pretrain import main

    main([*_arguments(recipe, fields)], time.perf_counter())
    return load(fields["out"])


def finetune(kind: str, recipe: str | Path | None = None, **fields: Any) -> LoadedRun:
    """Train a run further, as `gptsmith finetune KIND` does, and load the result.

        gptsmith.finetune("chat", base="runs/x", data="skills", out="runs/chat")

    kind: text, chat, instruct, classify, preference or reward. base: the run to start from (`from`
    in a recipe). recipe, fields, errors: see `pretrain`.
    """
    from gptsmith.commands.finetune import main

    if "base" in fields:
        fields["from"] = fields.pop("base")
    main([kind, *_arguments(recipe, fields)], time.perf_counter())
    return load(fields["out"])


def _arguments(recipe: str | Path | None, fields: Mapping[str, Any]) -> Iterator[str]:
    """The equivalent command line, so that checks and messages are the same."""
    if "out" not in fields:
        raise ValueError("give out=, the run folder to create")
    if recipe is not None:
        yield str(recipe)
    for name, value in flatten(fields).items():
        name = name.removesuffix(".preset")  # model={"preset": ...}, as in a recipe
        if not isinstance(value, Mapping):  # an empty section
            for each in value if isinstance(value, list | tuple) else [value]:
                yield f"--{name}={each}"
