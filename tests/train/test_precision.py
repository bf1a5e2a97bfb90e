import pytest
import torch

from gptsmith.train import precision

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


@pytest.mark.parametrize(
    ("bf16", "name", "why"),
    [(True, "bf16", "in hardware"), (False, "fp32", "neither avx512_bf16 nor AMX")],
)
def test_auto_on_a_cpu_asks_the_hardware(
    bf16: bool, name: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "cpu_bf16", lambda: bf16)
    chosen = precision.choose("auto", CPU)
    assert chosen.name == name
    assert why in chosen.reason


@pytest.mark.parametrize(
    ("capability", "name"), [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16")]
)
def test_auto_on_a_gpu_asks_its_generation(
    capability: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert precision.choose("auto", CUDA).name == name
    assert precision.choose("auto", MPS).name == "fp32"


def test_what_is_asked_for_is_taken_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_bf16", lambda: False)
    assert "emulates" in precision.choose("bf16", CPU).reason
    assert precision.choose("fp32", CPU).reason == "as set"
    assert precision.choose("fp16", CUDA).dtype == torch.float16
    with pytest.raises(ValueError, match="fp16 is for GPUs: take fp32, bf16 or auto"):
        precision.choose("fp16", CPU)


def test_autocast_casts_products_and_nothing_else() -> None:
    x = torch.ones(2, 2)
    with precision.choose("fp32", CPU).autocast():
        assert (x @ x).dtype == torch.float32
    with precision.Precision("bf16", "cpu", "").autocast():
        assert (x @ x).dtype == torch.bfloat16
        assert (x + x).dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")


def test_devices_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert precision.choose_device("auto") == precision.choose_device("cpu") == CPU
    for name, words in (
        ("cuda", "not available here"),
        ("mps", "not available here"),
        ("meta", "not available here"),
        ("gpu", "choose auto, cpu, cuda, cuda:N or mps"),
        ("", "choose auto"),
    ):
        with pytest.raises(ValueError, match=words):
            precision.choose_device(name)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert precision.choose_device("auto") == MPS
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert precision.choose_device("auto") == CUDA


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
        ("NVIDIA L40", None),  # 181, but not in the table: no part of a word counts
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
def test_the_peak_belongs_to_the_whole_name(
    name: str, tflops: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert precision.peak(CUDA) == (tflops and tflops * 1e12)
    share = precision.mfu(1e12, CUDA)
    assert share == (tflops and pytest.approx(1 / tflops))
    assert precision.peak(CPU) is precision.mfu(1e12, CPU) is None
