"""Servers under load: requests/s, tokens/s and waiting times, memory, seconds to the first answer.

    python -m benchmarks serve [--rounds 3] [--clients 1,8,32] [--contestants gptsmith,llama.cpp]

One model of GPT-2's size with random weights in bfloat16, served by `gptsmith serve` as it is and
with --quantize int8, by llama-server in f16 and q8_0, by vLLM and by `transformers serve`. Clients
send prompts of 20 to 400 tokens of English and read greedy texts as they are streamed, each the
next one after the last. Every server gets all cores and a cache of 16,384 tokens; one that fails
loses its own figures, and the others go on. All are started at the beginning and stopped (SIGSTOP)
but in their turn; they alternate, with new prompts in each round, and the figures are medians over
the rounds. The memory's speed is measured in the same
rounds; `of limit` is the share of it that the weights take, read once per token, for one client.
Memory is that of all processes of a server after its loads, `rest` what is beyond its weights and
the whole cache, which not all of them fill.

    LLAMA_SERVER         llama-server of llama.cpp (default: on the PATH)
    VLLM_PYTHON          a Python with vLLM (default: .venv-vllm, which `make test-vllm` makes)
    TRANSFORMERS_PYTHON  a Python with transformers, fastapi, uvicorn and openai (default: this one)

llama-server is built with -DCMAKE_BUILD_TYPE=Release -DLLAMA_BUILD_SERVER=ON. All of it takes about
12 minutes on two quiet cores; --rounds 1 or fewer contestants take less.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

import torch
from benchmarks._contestant import ROOT, closing_all
from benchmarks._load import Load, load
from benchmarks._machine import read_bytes
from benchmarks._servers import (
    CACHE_TOKENS,
    Command,
    Files,
    Server,
    gptsmith,
    llama_server,
    transformers,
    vllm,
)

from gptsmith.chat_template.template import tuning_template
from gptsmith.commands.export import exportable
from gptsmith.interop import gguf, hf
from gptsmith.kernels.packed_model import PackedModel
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.run.create import create_from_weights
from gptsmith.tokenizer import Tokenizer

DATA = Path(os.environ.get("GPTSMITH_DATA", ROOT / "tests" / "fixtures" / "data"))
PER_CLIENT = {1: 6, 8: 3, 32: 2}  # requests
ORIGIN = {"import": "random weights"}


def export(folder: Path) -> Files:
    torch.manual_seed(0)
    config = ModelConfig.preset("gpt2")
    model = GPTModel(config).bfloat16().eval()
    tokenizer = Tokenizer.gpt2(DATA / "gpt2_bpe")
    run = create_from_weights(
        folder / "random", ORIGIN, config, tokenizer, model.state_dict().items(), torch.bfloat16
    )
    hf.export(exportable(run), folder / "hf")
    files = {}
    for kind in ("f16", "q8_0"):
        gguf.export(exportable(run), folder / kind, kind)
        [files[kind]] = (folder / kind).glob("*.gguf")
    cache = CACHE_TOKENS * config.n_layer * 2 * config.n_embd * 2
    packed = {name: PackedModel(model, name).nbytes for name in ("bfloat16", "int8")}
    return Files(run.path, folder / "hf", files, packed, cache)


def contestants(files: Files, chosen: str) -> dict[str, Command]:
    """Who takes part. Who is missing is said."""
    cache = ("--cache-tokens", str(CACHE_TOKENS))
    commands: dict[str, Callable[[], Command | str]] = {
        "gptsmith bf16": lambda: gptsmith(files.run, files.packed["bfloat16"], *cache),
        "llama.cpp f16": lambda: llama_server(files.gguf["f16"]),
        "vLLM bf16": lambda: vllm(files),
        "transformers bf16": lambda: transformers(files),
        "gptsmith int8": lambda: gptsmith(
            files.run, files.packed["int8"], *cache, "--quantize", "int8"
        ),
        "llama.cpp q8_0": lambda: llama_server(files.gguf["q8_0"]),
    }
    found = {}
    for name, make in commands.items():
        if not any(name.casefold().startswith(word.casefold()) for word in chosen.split(",")):
            continue
        if isinstance(command := make(), Command):
            found[name] = command
        else:
            print(f"{name}: skipped, {command}")
    return found


def make_prompts(count: int, seed: int) -> list[str]:
    """Passages of English of 20 to 400 tokens, which begin at different places."""
    tokenizer = Tokenizer.gpt2(DATA / "gpt2_bpe")
    ids = tokenizer.encode((DATA / "tinyshakespeare" / "input.txt").read_text("utf-8"))
    rng = random.Random(seed)
    starts = rng.sample(range(len(ids) - 400), count)
    return [tokenizer.decode(ids[start : start + rng.randint(20, 400)]) for start in starts]


def measure_start(folder: Path, starts: int) -> list[float]:
    """Seconds from the start of `gptsmith serve` to its first answer, a chat model of the demo's
    size, without compiled kernels in the cache."""
    template = tuning_template(Tokenizer.byte(), None)
    config = ModelConfig.preset(
        "fast", n_layer=4, n_head=4, n_embd=192, context_length=256,
        vocab_size=template.tokenizer.vocab_size,
    )  # fmt: skip
    tensors = GPTModel(config).state_dict().items()
    run = create_from_weights(
        folder / "demo", ORIGIN, config, template.tokenizer, tensors, torch.float32, template.source
    )
    seconds = []
    for i in range(starts):
        command = gptsmith(run.path)._replace(environment={"XDG_CACHE_HOME": f"{folder}/{i}"})
        server = Server(command)
        seconds.append(server.start_seconds)
        server.close()
    return seconds


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--requests", type=int, help="of each client (default: 6, 3 and 2)")
    parser.add_argument("--tokens", type=int, default=64, help="generated tokens of a request")
    parser.add_argument(
        "--contestants", default="gptsmith,llama.cpp,vllm,transformers",
        help='beginnings of their names, such as "gptsmith int8"',
    )  # fmt: skip
    parser.add_argument("--starts", type=int, default=3, help="of the demo's model, to time them")
    options = parser.parse_args(argv)
    clients = [int(n) for n in options.clients.split(",")]
    with tempfile.TemporaryDirectory() as name, closing_all() as groups:
        folder = Path(name)
        files = export(folder)
        commands = contestants(files, options.contestants)
        servers: dict[str, Server] = {}
        for title, command in commands.items():
            with failing(f"{title} does not start"):
                servers[title] = Server(command)
                groups.append(servers[title])
                say(f"{title}: first answer after {servers[title].start_seconds:.1f} s")
        loads: dict[tuple[str, int], list[Load]] = {}
        speed = []
        for i in range(options.rounds):
            speed.append(read_bytes())
            say(f"round {i + 1} of {options.rounds}: memory {speed[-1] / 1e9:.1f} GB/s")
            for n in clients:
                count = n * (options.requests or PER_CLIENT.get(n, 2))
                prompts = make_prompts(count, seed=1000 * i + n)
                for title, server in servers.items():
                    with failing(f"{title}, {n} clients: no figure"), server.turn():
                        found = load(server.url, server.model, prompts, n, options.tokens)
                        loads.setdefault((title, n), []).append(found)
                        say(f"  {n:3} clients  {title:18} {found.tokens_per_second:7.0f} tokens/s")
        memory = {title: server.memory() for title, server in servers.items()}
        starts = {title: server.start_seconds for title, server in servers.items()}
        while groups:
            groups.pop().close()
        demo = measure_start(folder, options.starts) if options.starts else []
    report(loads, commands, speed)
    report_memory(commands, memory, starts, files.cache_bytes)
    if demo:
        print(
            f"\ngptsmith serve, model of the demo's size, no compiled kernels: first answer after "
            f"{statistics.median(demo):.1f} s"
        )


@contextmanager
def failing(what: str) -> Iterator[None]:
    """A contestant that fails costs its own figure, and the others go on."""
    try:
        yield
    except (RuntimeError, OSError, HTTPException) as error:
        say(f"{what}: {type(error).__name__}: {error}")


def report(
    loads: dict[tuple[str, int], list[Load]], commands: dict[str, Command], speed: list[float]
) -> None:
    limit = statistics.median(speed)
    print(f"\n{torch.get_num_threads()} threads; memory {limit / 1e9:.1f} GB/s; medians of rounds")
    print(
        f"{'clients':>7}  {'':18}{'requests/s':>11}{'tokens/s':>10}{'of limit':>10}"
        f"{'first token':>13}{'p99 between':>13}{'tokens':>8}"
    )
    for (title, n), rounds in sorted(loads.items(), key=lambda item: item[0][1]):
        median = Load(*(statistics.median(column) for column in zip(*rounds, strict=True)))
        share = median.tokens_per_second * commands[title].weight_bytes / limit
        print(
            f"{n:7}  {title:18}{median.requests_per_second:11.2f}{median.tokens_per_second:10.1f}"
            f"{f'{share:.0%}' if n == 1 else '':>10}{median.first_token * 1e3:10.0f} ms"
            f"{median.gap_p99 * 1e3:10.0f} ms{median.tokens:8.0f}"
        )


def report_memory(
    commands: dict[str, Command],
    memory: dict[str, float | None],
    starts: dict[str, float],
    cache_bytes: int,
) -> None:
    print(f"\n{'':18}{'start s':>9}{'memory MB':>11}{'weights':>9}{'cache':>7}{'rest':>7}")
    cache = cache_bytes / 1e6
    for title in starts:
        used, weights = memory[title], commands[title].weight_bytes / 1e6
        rest = f"{used - weights - cache:7.0f}" if used else ""
        print(f"{title:18}{starts[title]:9.1f}{used or 0:11.0f}{weights:9.0f}{cache:7.0f}{rest:>7}")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
