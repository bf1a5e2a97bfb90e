"""Build a model from stored weights or from another model, with strict checks.

C channels, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gptsmith.arguments import check_several
from gptsmith.model.classifier import GPTClassifier
from gptsmith.model.config import ModelConfig, Quantization
from gptsmith.model.gpt import GPTModel
from gptsmith.model.quantized import QuantizedLinear, quantized_layers, replace_linears

M = TypeVar("M", bound=GPTModel)


def load(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    origin: str | Path,
    *,
    quantized: Quantization | None = None,
    mask_folder: Path | None = None,
    trust_code: bool = False,
) -> GPTModel:
    """A model with `tensors` as its parameters (not copied, dtypes kept): a GPTClassifier if
    config has labels.

    quantized: the linear layers of the blocks are quantized, and `tensors` has their codes and
    scales. Raises ValueError naming `origin` and the parameters that are missing, unexpected, of
    another shape, or not finite. mask_folder, trust_code: see GPTModel.
    """
    _check_shapes(shapes(config, quantized), config, tensors, origin)
    model = empty(config, quantized, mask_folder=mask_folder, trust_code=trust_code)
    check(model.state_dict(), tensors, origin)
    model.load_state_dict(tensors, assign=True)
    return model


def load_in_fp32(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    origin: str | Path,
    *,
    quantize: Quantization | None = None,
    mask_folder: Path | None = None,
    trust_code: bool = False,
) -> GPTModel:
    """`load` with a copy of the tensors in fp32, which takes each from `tensors` when its turn has
    come. quantize: the linear layers of the blocks are quantized, one at a time."""
    _check_shapes(shapes(config), config, tensors, origin)
    model = empty(config, quantize, mask_folder=mask_folder, trust_code=trust_code)
    for name, tensor in validated(config, tensors.items(), origin):
        module, _, field = name.rpartition(".")
        layer = model.get_submodule(module)
        if isinstance(layer, QuantizedLinear) and field == "weight":
            layer.set_weight(tensor)
        else:
            model.get_parameter(name).data.copy_(tensor)
    return model


def empty(
    config: ModelConfig, quantized: Quantization | None = None, **mask_options: Any
) -> GPTModel:
    """A model whose weights are yet to come: until then, their memory is not even in use. A
    GPTClassifier if config has labels. quantized: see `load`. mask_options: those of GPTModel."""
    with skip_init():
        model = (GPTClassifier if config.labels else GPTModel)(config, **mask_options)
    if quantized:
        replace_linears(model, quantized, with_weights=False)
    return model


def _check_shapes(
    expected: Mapping[str, tuple[int, ...]],
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    origin: str | Path,
) -> None:
    """ValueError for tensors that do not fit, before a model of that architecture is made."""
    if config.n_layer > len(tensors):  # before that many layers are created
        raise ValueError(
            f"{origin} does not fit the architecture: {config.n_layer} layers, but {len(tensors)} "
            "tensors"
        )
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    check_state_dict(expected, given, origin)


def shapes(
    config: ModelConfig, quantized: Quantization | None = None
) -> dict[str, tuple[int, ...]]:
    """Parameter names and shapes of a model of this architecture; nothing is allocated.

    quantized: with codes and scales in place of the blocks' matrices. ValueError for sizes that no
    tensor can have.
    """
    config = config.model_copy(update={"mask": "causal()"})  # which has no parameters
    try:
        with torch.device("meta"):
            model = empty(config, quantized)
    except (RuntimeError, OverflowError, TypeError):  # torch's, of products above 2**63
        raise ValueError("the architecture has impossible sizes") from None
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def check(
    expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], origin: str | Path
) -> None:
    """ValueError, as from `load`, unless `tensors` is finite, with the names and shapes of
    `expected`."""
    check_state_dict(
        {name: tuple(tensor.shape) for name, tensor in expected.items()},
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        origin,
    )
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{origin}: {name} contains NaN or infinity, so training diverged;"
                " --checkpoint STEP opens an earlier state"
            )


def check_state_dict(
    expected: Mapping[str, tuple[int, ...]],
    given: Mapping[str, tuple[int, ...]],
    origin: str | Path,
) -> None:
    """ValueError naming the parameters that are missing, unexpected, or of another shape."""
    wrong = [f"{name} is missing" for name in expected if name not in given]
    wrong += [f"{name} is unexpected" for name in given if name not in expected]
    wrong += [
        f"{name} has shape {given[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in given and given[name] != shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{origin} does not fit the architecture: {', '.join(wrong[:3])}{more}")


def validated(
    config: ModelConfig, tensors: Iterable[tuple[str, Tensor]], origin: str | Path
) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters one at a time, each checked against the architecture.

    ValueError as from `load`.
    """
    expected = shapes(config)
    for name, tensor in tensors:
        shape = expected.pop(name, None)
        if shape is None:
            raise ValueError(f"{origin} does not fit the architecture: {name} is unexpected")
        check_state_dict({name: shape}, {name: tuple(tensor.shape)}, origin)
        if not tensor.isfinite().all():
            raise ValueError(f"{origin}: {name} contains NaN or infinity")
        yield name, tensor
    check_state_dict(expected, {}, origin)


def with_classification_head(model: GPTModel, labels: Sequence[str]) -> GPTClassifier:
    """The body of `model` (shared, not copied) under a new, random head for `labels`.

    The output head, or an earlier classification head, is dropped.
    """
    check_several(labels, "labels")
    tensors = {n: t for n, t in model.state_dict().items() if not n.startswith(("head.", "score."))}
    device = model.embedding.token.weight.device
    score = torch.empty(len(labels), model.config.n_embd).normal_(0.0, 0.02)
    config = model.config.change(labels=tuple(labels))
    return _rebuild(model, GPTClassifier, config, {**tensors, "score.weight": score}).to(device)


def with_dropout(model: GPTModel, dropout: float) -> GPTModel:
    """The same model (parameters shared, not copied) with another dropout probability."""
    return _rebuild(model, type(model), model.config.change(dropout=dropout), model.state_dict())


def _rebuild(
    model: GPTModel, kind: type[M], config: ModelConfig, tensors: Mapping[str, Tensor]
) -> M:
    """A model of another class or configuration with these tensors and the mask of `model`."""
    with skip_init():
        new = kind(config, mask=model.mask)
    for name, layer in quantized_layers(model):
        new.set_submodule(name, layer)
    new.load_state_dict(tensors, assign=True)
    return new.train(model.training)


@torch.no_grad()
def resize_token_embeddings(model: GPTModel, new_size: int, used: int | None = None) -> GPTModel:
    """Resize the vocabulary of `model` to new_size, in place; returns the model.

    The rows of new ids, in the embedding and an untied head, are the mean of the old rows: n of
    them take at most n / V of the old ids' probability (Hewitt 2021, "Initializing new word
    embeddings"). used: ids that the tokenizer has, by default all; the rows of a padded vocabulary
    beyond them become the mean as well. Raises ValueError if new_size is smaller than the old one.
    """
    old = model.config.vocab_size
    used = old if used is None else used
    if new_size < old or not 0 < used <= old:
        raise ValueError(f"a vocabulary of {old} ({used} used) cannot shrink to {new_size}")
    for table in (model.embedding.token, model.head):
        if table is not None:
            mean = table.weight[:used].float().mean(dim=0).to(table.weight.dtype)  # (C,)
            rows = torch.cat([table.weight[:used], mean.expand(new_size - used, -1)])  # (V, C)
            table.weight = nn.Parameter(rows, requires_grad=table.weight.requires_grad)
    model.embedding.token.num_embeddings = new_size
    if model.head is not None:
        model.head.out_features = new_size
    model.config = model.config.change(vocab_size=new_size)
    return model


class skip_init(TorchFunctionMode):  # noqa: N801 - a context, named like torch.no_grad
    """Context in which new parameters stay uninitialised: 10 ms for GPT-2 instead of 1.5 s.

    Random generators are not advanced. torch's meta device would do, but its first random fill
    imports 800 modules (0.9 s).
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
