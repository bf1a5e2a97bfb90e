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
    assert precision.choose("fp32", CPU).reason == "asked for"
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


def test_model_flops_utilization_where_the_peak_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert precision.mfu(1e12, CPU) is None
    for name, share in (
        ("NVIDIA H200", 0.5),
        ("NVIDIA A100-SXM4-80GB", 989 / 624),
        ("Other", None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert precision.mfu(989e12 / 2, CUDA) == (share and pytest.approx(share))
