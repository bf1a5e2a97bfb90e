"""A model from its stored weights: strictly those that belong to it, not filled at random first."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel


def load(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    origin: str | Path,
    *,
    mask_folder: Path | None = None,
    trust_code: bool = False,
) -> GPTModel:
    """The model whose parameters are `tensors` (taken over, not copied; in their own dtype).

    Raises ValueError naming `origin` and the parameters that are missing, unexpected, of another
    shape, or not finite. mask_folder, trust_code: see GPTModel.
    """
    with _Unfilled():
        model = GPTModel(config, mask_folder=mask_folder, trust_code=trust_code)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = [f"{name} is missing" for name in expected if name not in tensors]
    wrong += [f"{name} does not belong there" for name in tensors if name not in expected]
    wrong += [
        f"{name} is {tuple(tensors[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{origin} does not fit the architecture: {', '.join(wrong[:3])}{more}")
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{origin} is unusable, {name} holds NaN or infinity: the training diverged;"
                " --checkpoint STEP opens an earlier state"
            )
    model.load_state_dict(tensors, assign=True)
    return model


class _Unfilled(TorchFunctionMode):
    """Leaves new parameters uninitialised and the random streams alone: 10 ms for GPT-2, not 1.5 s.

    torch's meta device would do, but the first random fill on it imports 800 modules (0.9 s).
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func.__name__ in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
