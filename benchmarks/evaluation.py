"""Multiple-choice scoring compared with lm-evaluation-harness on transformers.

    python -m benchmarks evaluation [--task hellaswag] [--items 40] [--batch-sizes 1,4,8,16]

A model of GPT-2's size with random weights in fp32, as a run folder for us and exported by
`gptsmith export` for the harness; the same questions, from text to log-likelihoods. Each contestant
has its own process, and they alternate. The harness first runs once with each batch size (also
`auto`, which measures before it starts); its fastest one is compared: medians over the rounds, and
the largest difference of the log-likelihoods.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from gptsmith.evaluate import accuracy, prefix_tree
from gptsmith.evaluate.likelihood import encode_pairs
from gptsmith.evaluate.multiple_choice import TASKS, Question, load
from gptsmith.model import flops
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.run import Run
from gptsmith.run.create import create_from_weights
from gptsmith.tokenizer import Tokenizer

DATA = Path(os.environ.get("GPTSMITH_DATA", Path(__file__).parents[2] / "shared" / "data"))

Scorer = Callable[[], list[float]]  # the log-likelihood of every choice, in order


@dataclass
class Contestant:
    name: str
    batch_size: str | None  # of the harness; None for ours
    seconds: list[float] = field(default_factory=list)  # of each round
    nats: list[float] = field(default_factory=list)


def ours(folder: Path, questions: Sequence[Question]) -> Scorer:
    run = Run.open(folder / "run")
    model, tokenizer = run.load_model(), run.tokenizer

    def score() -> list[float]:
        items = accuracy.score(model, tokenizer, TASKS["hellaswag"], questions).items
        return [nats for item in items for nats in item["nats"]]

    return score


def theirs(folder: Path, questions: Sequence[Question], batch_size: str) -> Scorer:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=str(folder / "hf"), device="cpu", dtype="float32", batch_size=batch_size)
    pairs = [pair for question in questions for pair in question.choices]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    return lambda: [nats for nats, _ in lm.loglikelihood(requests, disable_tqdm=True)]


def serve(
    parent: Connection, batch_size: str | None, folder: Path, questions: Sequence[Question]
) -> None:
    """A contestant's process: warms up, then scores all questions for every True it receives."""
    os.environ.update(
        HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", TOKENIZERS_PARALLELISM="false"
    )

    def scorer(some: Sequence[Question]) -> Scorer:
        return theirs(folder, some, batch_size) if batch_size else ours(folder, some)

    scorer(questions[:2])()
    score = scorer(questions)
    parent.send(None)
    while parent.recv():
        begin = time.perf_counter()
        nats = score()
        parent.send((time.perf_counter() - begin, nats))


def turn(who: Contestant, pipe: Connection) -> float:
    pipe.send(True)
    seconds, who.nats = pipe.recv()
    who.seconds.append(seconds)
    return seconds


def prepare(folder: Path, config: ModelConfig) -> Run:
    """The same random weights as a run and as a folder for transformers."""
    from gptsmith.commands.export import exportable
    from gptsmith.interop import hf

    torch.manual_seed(0)
    tensors = GPTModel(config).state_dict()
    origin = {"import": "random weights"}
    tokenizer = Tokenizer.gpt2(DATA / "gpt2_bpe")
    run = create_from_weights(
        folder / "run", origin, config, tokenizer, tensors.items(), torch.float32
    )
    hf.export(exportable(run), folder / "hf")
    return run


def tokens_read(run: Run, questions: Sequence[Question]) -> tuple[int, int]:
    """Tokens that the network reads with each choice as a text of its own, and in prefix trees."""
    pairs = [pair for question in questions for pair in question.choices]
    requests = encode_pairs(run.tokenizer, pairs)
    texts = {(*context, *text)[:-1]: len(text) for context, text in requests}
    order = sorted(texts)
    groups = prefix_tree.plan(order, [texts[text] for text in order], run.model_config.n_embd, 0)
    alone = sum(len(context) + len(text) - 1 for context, text in requests)
    return alone, sum(len(group.prefix) + prefix_tree.count_nodes(group.trees) for group in groups)


def main(argv: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks evaluation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--task", default="hellaswag", choices=list(TASKS))
    parser.add_argument("--items", type=int, default=40)
    parser.add_argument("--batch-sizes", default="1,4,8,16", help="of the harness, or auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="gpt2", help="a preset")
    options = parser.parse_args(argv)
    try:
        import lm_eval  # noqa: F401
        import transformers  # noqa: F401
    except ModuleNotFoundError as error:
        print(f"skipped: {error.name} is not installed")
        return
    questions = load(options.task, DATA, options.items)
    me, *others = everyone = [
        Contestant("gptsmith", None),
        *(Contestant(f"lm-eval, batch size {n}", n) for n in options.batch_sizes.split(",")),
    ]
    context = multiprocessing.get_context("spawn")  # no shared state
    with tempfile.TemporaryDirectory() as name:
        run = prepare(Path(name), ModelConfig.preset(options.model))
        pipes, processes = {}, []
        for who in everyone:
            pipes[who.name], there = context.Pipe()
            arguments = (there, who.batch_size, Path(name), questions)
            processes.append(context.Process(target=serve, args=arguments, daemon=True))
            processes[-1].start()
            there.close()  # so that recv ends if the process does
            pipes[who.name].recv()
        best = min(others, key=lambda who: turn(who, pipes[who.name]))
        rounds = [
            (turn(me, pipes[me.name]), turn(best, pipes[best.name])) for _ in range(options.rounds)
        ]
        for pipe in pipes.values():
            pipe.send(False)
        for process in processes:
            process.join()
        alone, shared = tokens_read(run, questions)
    print(
        f"{options.task}, {len(questions)} questions, {flops.parameters(run.model_config):,}"
        f" parameters, fp32, torch {torch.__version__}, {torch.get_num_threads()} threads;"
        f" tokens read: {alone:,} where each choice is a text of its own, {shared:,} shared"
    )
    for who in everyone:
        seconds = statistics.median(who.seconds)
        rate = len(questions) / seconds
        print(f"{who.name:24}{seconds:8.1f} s{rate:8.2f} questions/s  rounds {len(who.seconds)}")
    ratio = statistics.median(b / a for a, b in rounds)
    worst = max(abs(a - b) for a, b in zip(me.nats, best.nats, strict=True))
    print(
        f"{ratio:.2f} times as fast as {best.name}; log-likelihoods differ by at most {worst:.1e}"
    )


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
