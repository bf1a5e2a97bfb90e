"""A continuation scored among many has the likelihood that it has alone, under every mask."""

import random
from collections.abc import Sequence

import pytest
import torch

from gptsmith.evaluate import likelihood, prefix_tree
from gptsmith.evaluate.likelihood import Request, log_likelihoods
from gptsmith.model import masks
from gptsmith.model.config import ModelConfig
from gptsmith.model.gpt import GPTModel

V, LIMIT = 61, 96


def model_of(preset: str, mask: str, **fields: int) -> GPTModel:
    torch.manual_seed(0)
    config = ModelConfig.preset(
        preset, n_layer=2, n_embd=48, n_head=3, vocab_size=V, context_length=LIMIT, mask=mask
    )
    model = GPTModel(config.change(**fields))
    for p in model.parameters():
        if p.dim() > 1:
            p.data *= 4  # so that outputs depend on the context
    return model.eval()


def alone(model: GPTModel, request: Request) -> tuple[float, bool]:
    """By one plain forward pass over the text, truncated as lm-evaluation-harness does."""
    text = torch.tensor([[*request.context, *request.continuation][-(LIMIT + 1) :]])
    n = len(request.continuation)
    with torch.no_grad():
        scores = model(text[:, :-1])[0, -n:].log_softmax(dim=-1)  # (n, V)
    target = torch.tensor(request.continuation)
    nats = scores.gather(1, target[:, None]).double().sum()
    return float(nats), bool((scores.argmax(dim=-1) == target).all())


def some_requests() -> list[Request]:
    """Questions with endings, truncated texts, shared worked examples, single letters."""
    dice = random.Random(1)

    def tokens(low: int, high: int) -> list[int]:
        return [dice.randrange(V) for _ in range(dice.randint(low, high))]

    requests = []
    for _ in range(5):
        context = tokens(1, 40)
        requests += [Request(context, tokens(1, 30)) for _ in range(4)]
    context = tokens(90, 90)
    requests += [Request(context, tokens(3, 20)) for _ in range(3)]
    prefix = tokens(70, 70)
    for _ in range(12):
        context = prefix + tokens(0, 20)
        requests += [Request(context, [letter]) for letter in (1, 2, 3, 4)]
    context = tokens(30, 30)
    requests += [Request([*context, option], [5, 6, 7]) for option in (8, 9)]
    dice.shuffle(requests)
    return [*requests, requests[0]]


def check(model: GPTModel, requests: Sequence[Request]) -> None:
    found = log_likelihoods(model, requests)
    expected = [alone(model, request) for request in requests]
    assert [f.nats for f in found] == pytest.approx([nats for nats, _ in expected], abs=1e-4)
    assert [f.greedy for f in found] == [greedy for _, greedy in expected]


def test_ranks_take_turns_and_their_sum_is_what_one_process_finds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, requests = model_of("fast", "causal()"), some_requests()
    whole = torch.tensor(log_likelihoods(model, requests), dtype=torch.float64)
    shares: list[torch.Tensor] = []
    for rank in range(3):
        monkeypatch.setattr(likelihood.distributed, "world_size", lambda: 3)
        monkeypatch.setattr(likelihood.distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(
            likelihood.distributed, "sum_over_ranks", lambda x: shares.append(x.clone()) or x
        )
        log_likelihoods(model, requests)
    assert torch.equal(sum(shares), whole)
    assert all(share.any() for share in shares)
    assert (sum((share != 0).int() for share in shares) == (whole != 0)).all()  # each by one rank


@pytest.mark.parametrize("preset", ["tiny", "fast"])
@pytest.mark.parametrize(
    "mask",
    [
        "causal()",
        "causal() & sliding_window(12)",
        "prefix(10)",
        "prefix(80)",
        "causal() | prefix(5)",
        "bidirectional()",
    ],
)
def test_likelihoods_of_a_batch_equal_those_of_each_request_alone(
    preset: str, mask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(likelihood.BUDGET, "cpu", 256)
    monkeypatch.setattr(likelihood, "BLOCK", 25)  # the last block of the vocabulary is smaller
    monkeypatch.setattr(prefix_tree, "MAX_NODES", 120)
    check(model_of(preset, mask), some_requests())


def test_grouped_queries_and_masks_that_differ_by_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_tree, "MAX_NODES", 120)
    model = model_of("fast", "causal()", n_head=4, n_kv_head=2)
    check(model, some_requests())
    model.mask = masks.causal() & masks.Mask(lambda b, h, q, k: (q - k < 9) | (h < 2))
    check(model, some_requests())


def test_shared_prefix_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By counting the tokens that go through the network."""
    monkeypatch.setattr(prefix_tree, "MAX_NODES", 120)
    model = model_of("tiny", "causal()")
    read = []
    model.embedding.register_forward_hook(lambda module, given, x: read.append(x[..., 0].numel()))
    prefix = [random.Random(2).randrange(V) for _ in range(70)]
    contexts = [[*prefix, i, i + 1, i + 2] for i in range(40)]
    log_likelihoods(model, [Request(c, [letter]) for c in contexts for letter in range(4)])
    assert sum(read) == 70 + 40 * 3


def test_greedy_is_true_for_what_greedy_decoding_writes() -> None:
    model = model_of("tiny", "causal()")
    ids = [1, 2, 3]
    for _ in range(4):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    right, wrong = Request(ids[:3], ids[3:]), Request(ids[:3], [*ids[3:-1], (ids[-1] + 1) % V])
    assert [f.greedy for f in log_likelihoods(model, [right, wrong])] == [True, False]


def test_padded_vocabulary_gets_no_probability() -> None:
    model = model_of("tiny", "causal()")
    requests = [Request([1, 2], [3, 4])]
    (whole,), (cut,) = log_likelihoods(model, requests), log_likelihoods(model, requests, V - 20)
    assert cut.nats > whole.nats
    with torch.no_grad():
        scores = model(torch.tensor([[1, 2, 3]]))[0, -2:, : V - 20].log_softmax(dim=-1)
    assert cut.nats == pytest.approx(float(scores[0, 3] + scores[1, 4]), abs=1e-5)


def test_bfloat16_weights_and_independence_of_autocast_and_mode() -> None:
    model = model_of("tiny", "causal()")
    requests = some_requests()
    exact = log_likelihoods(model, requests)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        assert log_likelihoods(model, requests) == exact
    assert model.training
    low = log_likelihoods(model.bfloat16(), requests)
    per_token = [
        abs(a.nats - b.nats) / len(r.continuation)
        for a, b, r in zip(exact, low, requests, strict=True)
    ]
    assert 0 < max(per_token) < 1


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([], [1]), "request 2: the context is empty"),
        (Request([1], []), "request 2: the continuation is empty"),
        (
            Request([1], [1] * (LIMIT + 1)),
            "continuation of 97 tokens does not fit .* context of 96",
        ),
        (Request([1], [V]), f"the id {V}, outside the vocabulary 0..{V - 1}"),
    ],
)
def test_invalid_requests_are_rejected(request_: Request, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        log_likelihoods(model_of("tiny", "causal()"), [Request([1], [1]), request_])


def test_mask_that_depends_on_the_batch_row_is_rejected() -> None:
    model = model_of("tiny", "causal()")
    model.mask = masks.causal() & masks.documents(torch.zeros(4, LIMIT, dtype=torch.long))
    with pytest.raises(ValueError, match="depends on the row of the batch"):
        log_likelihoods(model, [Request([1], [1])])


def test_no_requests_no_likelihoods() -> None:
    assert log_likelihoods(model_of("tiny", "causal()"), []) == []
