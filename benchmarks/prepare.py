"""(c) MB/s from text to token shards with the GPT-2 vocabulary; tiktoken and tokenizers compared.

    python -m benchmarks prepare [--data FOLDER] [--rounds 5]

The text is the folder's english_novels, 74 MB in 93 files. All methods give the same ids, which is
checked. They alternate, each in a process of its own; the figures are medians. Encoding is limited
neither by arithmetic nor by memory bandwidth (which is printed), so the machine's limit is taken to
be tiktoken, the fastest encoder found, at the speed of one thread on each core (`share`).
"""

import argparse
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
METHODS = (
    "gptsmith prepare, whole command",
    "gptsmith prepare, tokenizing",
    "tiktoken, 1 thread",
    "tiktoken, 2 threads",
    "tokenizers, all cores",
)


def main(argv: Sequence[str]) -> None:
    """Print a table, or one line if there is no text."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks prepare")
    parser.add_argument(
        "--data", default=os.environ.get("GPTSMITH_DATA", ROOT.parent / "shared/data")
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    data = Path(options.data)
    novels = sorted((data / "english_novels").glob("*.txt"))
    if not novels:
        print(f"{data}/english_novels: no text to measure with; give its folder with --data")
        return
    if options.method:
        print(*measure(options.method, data, novels))
        return
    megabytes = sum(path.stat().st_size for path in novels) / 1e6
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    digests: dict[str, str] = {}
    for number in range(options.rounds):
        for method in METHODS:
            words = ["--data", str(data), "--method", method]
            code = "import sys; from benchmarks.prepare import main; main(sys.argv[1:])"
            command = [sys.executable, "-c", code, *words]
            answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if answer.returncode:
                raise SystemExit(answer.stderr)
            taken, digest = answer.stdout.split()
            seconds[method].append(float(taken))
            digests[method] = digest
        print(f"round {number + 1} of {options.rounds} done", file=sys.stderr, flush=True)
    assert len(set(digests.values())) == 1, digests
    from benchmarks._machine import copy_bytes

    from gptsmith.data.encode import available_cores

    base = statistics.median(seconds["tiktoken, 1 thread"])
    cores = available_cores()
    limit = cores * megabytes / base
    print(
        f"{megabytes:.1f} MB of English, {len(novels)} files, same ids; limit {limit:.1f} MB/s: "
        f"{cores} cores at tiktoken's one thread; memory copies {copy_bytes() / 1e6:,.0f} MB/s\n"
    )
    print(f"{'':34}{'seconds':>9}{'MB/s':>8}{'x tiktoken':>12}{'share':>7}")
    for method, times in seconds.items():
        median = statistics.median(times)
        speed = megabytes / median
        print(f"{method:34}{median:9.2f}{speed:8.1f}{base / median:12.2f}{speed / limit:7.0%}")


def measure(method: str, data: Path, novels: list[Path]) -> tuple[float, str]:
    """Seconds, and sha256 of the ids of all novels, each preceded by <|endoftext|>."""
    if method == METHODS[0]:
        return whole_command(data, novels)
    if method == METHODS[1]:
        return tokenizing_part(data, novels)
    return other_encoder(method, data, novels)


def whole_command(data: Path, novels: list[Path]) -> tuple[float, str]:
    """The command as a user runs it, from start-up to the manifest."""
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "novels")
        words = [str(novels[0].parent), "--out", str(out), "--tokenizer", "gpt2"]
        # the last novel is the validation split, so that the training stream is all others in order
        command = [sys.executable, "-m", "gptsmith", "prepare", *words]
        command += ["--val", str(novels[-1])]
        start = time.perf_counter()
        subprocess.run(
            command,
            check=True,
            capture_output=True,
            env={**os.environ, "GPTSMITH_DATA": str(data)},
        )
        seconds = time.perf_counter() - start
        shards = [np.load(path) for path in sorted(out.glob("train-*.npy"))]
    return seconds, digest_of(shards)


def tokenizing_part(data: Path, novels: list[Path]) -> tuple[float, str]:
    """Batches of documents to tokens, on all cores, with the text in memory."""
    from functools import partial

    import numpy as np

    from gptsmith.data.documents import Document
    from gptsmith.data.encode import available_cores, encode, encode_in_order, make_batches
    from gptsmith.data.split import SplitDocument
    from gptsmith.tokenizer import Tokenizer

    tokenizer = Tokenizer.gpt2(data / "gpt2_bpe")
    tokenizer.encode("warm")
    encode_one = partial(encode, tokenizer=tokenizer, token_bytes=tokenizer.token_bytes())
    documents: list[SplitDocument] = [
        ("train", Document(str(i), chunks_of(text))) for i, text in enumerate(read(novels))
    ]
    eos = np.array([tokenizer.eos_id], tokenizer.dtype)
    start = time.perf_counter()
    batches = make_batches(documents, whole=False, left_out=dict)
    ids = [
        array
        for batch, encoded in encode_in_order(batches, encode_one, available_cores())
        for chunk, (of_chunk, _) in zip(batch.chunks, encoded, strict=True)
        for array in ((eos, of_chunk) if chunk.first else (of_chunk,))
    ]
    return time.perf_counter() - start, digest_of(ids)


def chunks_of(text: str) -> list[str]:
    """Cut at safe borders, as the reader of text files does."""
    from gptsmith.data.text_files import CHUNK_BYTES, safe_cut

    chunks = []
    while len(text) > CHUNK_BYTES:
        cut = safe_cut(text[:CHUNK_BYTES])
        chunks.append(text[:cut])
        text = text[cut:]
    return [*chunks, text]


def other_encoder(method: str, data: Path, novels: list[Path]) -> tuple[float, str]:
    """The encoder alone: text in memory to lists of ids in memory."""
    texts = read(novels)
    run: Callable[[], Iterable[list[int]]]
    if method.startswith("tiktoken"):
        encoding = tiktoken_gpt2(data / "gpt2_bpe")
        encoding.encode_ordinary("warm")
        if "1 thread" in method:
            run = lambda: [encoding.encode_ordinary(text) for text in texts]  # noqa: E731
        else:
            run = lambda: encoding.encode_ordinary_batch(texts, num_threads=2)  # noqa: E731
    else:
        from tokenizers import Tokenizer

        from gptsmith.tokenizer import tokenizer as ours

        reference = Tokenizer.from_str(ours.Tokenizer.gpt2(data / "gpt2_bpe").to_json())
        reference.encode_special_tokens = True
        run = lambda: [one.ids for one in reference.encode_batch_fast(texts)]  # noqa: E731
    start = time.perf_counter()
    lists = run()
    seconds = time.perf_counter() - start
    import numpy as np

    return seconds, digest_of([np.array([50256, *ids], np.uint16) for ids in lists])


def tiktoken_gpt2(folder: Path) -> Any:
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

    os.environ["TIKTOKEN_CACHE_DIR"] = ""
    ranks = data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
    return tiktoken.Encoding(
        "gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": 50256},
    )


def read(novels: list[Path]) -> list[str]:
    return [path.read_bytes().decode("utf-8-sig") for path in novels]


def digest_of(arrays: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.astype("<u2").tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main(sys.argv[1:])
