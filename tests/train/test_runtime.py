"""Precision, device, torch.compile and allocator."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gptsmith import compilers
from gptsmith.batch import IGNORE_INDEX, Batch
from gptsmith.model import attention
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel
from gptsmith.train import runtime
from gptsmith.train.loss import next_token_loss
from gptsmith.train.runtime import choose_compile

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


@pytest.mark.parametrize(
    ("bf16", "name", "why"),
    [(True, "bf16", "in hardware"), (False, "fp32", "neither avx512_bf16 nor AMX")],
)
def test_auto_precision_on_a_cpu_depends_on_its_bf16_support(
    bf16: bool, name: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "cpu_has_bf16", lambda: bf16)
    chosen = runtime.choose_precision("auto", CPU)
    assert chosen.name == name
    assert why in chosen.reason


@pytest.mark.parametrize(
    ("capability", "name"), [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16")]
)
def test_auto_precision_on_a_gpu_depends_on_its_compute_capability(
    capability: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert runtime.choose_precision("auto", CUDA).name == name
    assert runtime.choose_precision("auto", MPS).name == "fp32"


def test_explicit_precision_is_used_or_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "cpu_has_bf16", lambda: False)
    assert "emulates" in runtime.choose_precision("bf16", CPU).reason
    assert runtime.choose_precision("fp32", CPU).reason == "as configured"
    assert runtime.choose_precision("fp16", CUDA).dtype == torch.float16
    with pytest.raises(ValueError, match="fp16 is for GPUs: use fp32, bf16 or auto"):
        runtime.choose_precision("fp16", CPU)


def test_autocast_casts_matrix_products_only() -> None:
    x = torch.ones(2, 2)
    with runtime.choose_precision("fp32", CPU).autocast():
        assert (x @ x).dtype == torch.float32
    with runtime.Precision("bf16", "cpu", "").autocast():
        assert (x @ x).dtype == torch.bfloat16
        assert (x + x).dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")


def test_choose_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert runtime.choose_device("auto") == runtime.choose_device("cpu") == CPU
    for name, words in (
        ("cuda", "not available here"),
        ("mps", "not available here"),
        ("meta", "not available here"),
        ("gpu", "choose auto, cpu, cuda, cuda:N or mps"),
        ("", "choose auto"),
    ):
        with pytest.raises(ValueError, match=words):
            runtime.choose_device(name)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert runtime.choose_device("auto") == MPS
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert runtime.choose_device("auto") == CUDA
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert runtime.choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="'cuda:2' is not available here"):
        runtime.choose_device("cuda:2")


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", None),  # 181, but not in the table: parts of words do not match
        ("Tesla T4", 65),
        ("NVIDIA T400 4GB", None),
        ("Tesla V100-SXM2-16GB", 125),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA RTX A1000", None),
        ("Other", None),
    ],
)
def test_peak_flops_matches_whole_words_of_the_device_name(
    name: str, tflops: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert runtime.peak_flops(CUDA) == (tflops and tflops * 1e12)
    share = runtime.mfu(1e12, CUDA)
    assert share == (tflops and pytest.approx(1 / tflops))
    assert runtime.peak_flops(CPU) is runtime.mfu(1e12, CPU) is None


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)


@pytest.mark.usefixtures("compiler")
def test_auto_compiles_long_runs_only() -> None:
    per_second = 60e9 * torch.get_num_threads()
    for flops, seconds, on in (
        (per_second * 30, None, False),
        (per_second * 3000, None, True),
        (per_second * 3000, 85.0, False),  # the time limit counts more than the FLOPs
        (per_second * 30, 3600.0, True),
    ):
        chosen, why = choose_compile("auto", CPU, flops, seconds)
        assert chosen is on
        assert "s of work" in why
    assert choose_compile("auto", MPS, 1e30, None)[0] is False
    assert choose_compile("on", CPU, 1.0, None) == (True, "as configured")
    assert choose_compile("off", CUDA, 1e30, None) == (False, "as configured")


@pytest.mark.usefixtures("compiler")
def test_auto_on_a_gpu_depends_on_its_age_and_on_the_length_of_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for flops, seconds, on in ((1e14, None, False), (1e17, None, True), (1e17, 20.0, False)):
        assert choose_compile("auto", CUDA, flops, seconds)[0] is on
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert choose_compile("auto", CUDA, 1e17, None) == (
        False,
        "the GPU is older than those that Triton supports",
    )


@pytest.mark.usefixtures("no_compiler")
def test_auto_does_not_compile_without_a_compiler() -> None:
    assert choose_compile("auto", CPU, 1e30, None) == (
        False,
        "there is no C++ compiler ($CXX, else g++)",
    )
    assert choose_compile("off", CPU, 1e30, None)[0] is False
    assert choose_compile("auto", CUDA, 1e30, None)[0] is False
    for device in (CPU, CUDA):
        with pytest.raises(
            ValueError, match=r"^train.compile on: .*: install what is missing, or use auto$"
        ):
            choose_compile("on", device, 1.0, None)


@pytest.mark.usefixtures("compiler")
def test_compiling_needs_the_headers_of_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert compilers.missing("cpu") == compilers.missing("cuda") == ""
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    for device in (CPU, CUDA):
        chosen, why = choose_compile("auto", device, 1e30, None)
        assert not chosen
        assert "apt install python3-dev" in why


def test_the_compiler_is_that_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config, cpp_builder, exc

    def torchs() -> str | None:
        """What Inductor finds in this environment, which it reads when it is imported."""
        cpp_builder.cpp_compiler_search.cache_clear()
        usual = "clang++" if sys.platform == "darwin" else "g++"
        with config.patch({"cpp.cxx": (None, os.environ.get("CXX", usual))}):
            try:
                return shutil.which(cpp_builder.get_cpp_compiler())
            except (exc.InvalidCxxCompiler, PermissionError):  # the second for an empty CXX
                return None

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert compilers.cxx_compiler() is torchs() is None
    for name in ("clang++", "mine", "g++"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
        for chosen in (None, "mine", str(tmp_path / "mine"), "ccache mine", ""):
            with monkeypatch.context() as patched:
                if chosen is not None:
                    patched.setenv("CXX", chosen)
                assert compilers.cxx_compiler() == torchs()
    cpp_builder.cpp_compiler_search.cache_clear()


def packed(*lengths: int, T: int = 16) -> tuple[Tensor, Tensor]:
    """Document numbers and positions (T,) of a row of documents of these lengths, then padding."""
    documents = torch.full((T,), len(lengths))
    positions = torch.zeros(T, dtype=torch.long)
    start = 0
    for number, length in enumerate(lengths):
        documents[start : start + length] = number
        positions[start : start + length] = torch.arange(length)
        start += length
    return documents, positions


def batches(of: str) -> list[Batch]:
    """Three batches of equal shape."""
    made = []
    rows = [[(5, 7, 3), (16,)], [(1, 1, 14), (8,)], [(16,), (2, 3, 4)]]
    for number, lengths in enumerate(rows):
        ids = torch.randint(50, (2, 17), generator=torch.Generator().manual_seed(number))
        batch = Batch(ids[:, :-1], ids[:, 1:].clone(), name=f"batch {number}")
        if of == "packed rows":
            documents, positions = (
                torch.stack(x) for x in zip(*(packed(*row) for row in lengths), strict=True)
            )
            batch.targets[documents != documents.roll(-1, 1)] = (
                IGNORE_INDEX  # another document's token
            )
            tokens = sum(map(sum, lengths))
            batch = replace(batch, documents=documents, positions=positions, tokens=tokens)
        made.append(batch)
    return made


# torch itself instantiates one while tracing our autograd.Function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("of", ["whole rows", "packed rows"])
@pytest.mark.parametrize("name", ["tiny", "fast"])
def test_compiled_loss_is_one_graph_with_the_same_gradients(
    name: str, of: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced, differentiated and run as a graph, without generating machine code, which would take
    a minute. One graph must serve all batches of a shape: no recompilation at each step."""
    real = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **given: real(f, backend="aot_eager", fullgraph=True, **given)
    )
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    c = ModelConfig.preset(name)
    c = ModelConfig(**{**c.model_dump(), "n_layer": 1, "vocab_size": 50, "context_length": 16})
    model = GPTModel(c)
    compiled = runtime.compiled(next_token_loss)
    for batch in batches(of):
        results = []
        for loss in (next_token_loss, compiled):
            model.zero_grad()
            with torch._dynamo.config.patch(error_on_recompile=True):
                summed = loss(model, batch)
            summed.backward()
            results.append([summed.detach(), *(p.grad for p in model.parameters())])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("of", ["whole rows", "packed rows"])
@pytest.mark.parametrize(
    "axes",
    [
        {},
        dict(mask="causal() & sliding_window(8)"),
        dict(mask="causal() & sliding_window(8)", n_kv_head=1),
        dict(mask="prefix(3)"),
    ],
)
def test_flex_attention_is_one_graph_for_all_batches(
    axes: dict, of: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: block masks are made inside the graph, for the documents of each batch."""
    real = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **given: real(f, backend="eager", fullgraph=True, **given)
    )
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_head=2, n_embd=32, d_ff=8, context_length=16, vocab_size=50)
    model = GPTModel(ModelConfig(**{**sizes, **axes})).eval()
    graph = runtime.compiled(next_token_loss)
    with torch.no_grad():  # FlexAttention has no backward pass on a CPU
        dense = [next_token_loss(model, batch) for batch in batches(of)]
        monkeypatch.setattr(attention, "is_cuda", lambda device: True)
        for batch, expected in zip(batches(of), dense, strict=True):
            with torch._dynamo.config.patch(error_on_recompile=True):
                torch.testing.assert_close(graph(model, batch), expected, rtol=1e-4, atol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_loss_compiles_with_a_frozen_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """LinearCrossEntropy then saves no gradient of the head."""
    real = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **given: real(f, backend="aot_eager", fullgraph=True, **given)
    )
    torch.compiler.reset()
    torch.manual_seed(0)
    sizes = dict(n_layer=1, n_head=1, n_embd=8, d_ff=8, context_length=16, vocab_size=50)
    model = GPTModel(ModelConfig(**sizes, tie_embeddings=False))
    model.head_weight.requires_grad_(False)
    batch = batches("whole rows")[0]
    trained = [p for p in model.parameters() if p.requires_grad]
    plain, graph = (
        torch.autograd.grad(loss(model, batch), trained)
        for loss in (next_token_loss, runtime.compiled(next_token_loss))
    )
    for a, b in zip(plain, graph, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# Page faults of a real process that keeps or returns its freed memory.
FAULTS = """
import resource, sys, torch
from gptsmith.train.runtime import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def work(times):
    for _ in range(times):
        torch.ones(2**24)  # 64 MiB: 16,384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(-work(20) + work(20))  # the second half: the heap has reached its size
"""


def faults(how: str) -> int:
    command = [sys.executable, "-c", FAULTS, how]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_reused() -> None:
    assert faults("keep") < faults("leave") / 3


def test_deterministic_algorithms_are_for_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    on = torch.are_deterministic_algorithms_enabled
    seen = []

    def steps() -> Iterator[int]:
        for number in range(3):
            seen.append(("step", on()))
            yield number
        raise ValueError("diverged")

    def run() -> None:
        for _ in runtime.deterministic(steps()):
            seen.append(("between", on()))

    runtime.prepare_determinism()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    with pytest.raises(ValueError, match="diverged"):
        run()
    assert seen == [("step", True), ("between", False)] * 3
    assert not on()
    assert list(runtime.deterministic(iter([1, 2]))) == [1, 2]


def test_the_caller_s_choice_of_deterministic_algorithms_is_restored() -> None:
    settings = torch.utils.deterministic
    assert settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        steps = (
            (torch.is_deterministic_algorithms_warn_only_enabled(),
             settings.fill_uninitialized_memory)
            for _ in range(2)
        )  # fmt: skip
        for during in runtime.deterministic(steps):
            assert during == (False, False)
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.is_deterministic_algorithms_warn_only_enabled()
            assert settings.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)
