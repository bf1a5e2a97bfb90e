"""Fine-tune a chat model on pairs of a better and a worse answer: DPO and its relatives."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from gptsmith.batch import IGNORE_INDEX
from gptsmith.chat_template.template import CHAT_TOKENS, ChatTemplate, tuning_template
from gptsmith.data.mistakes import skill_pairs
from gptsmith.data.pair_rows import PairRows
from gptsmith.data.pairs import Pairs, encode_pairs, load_pairs
from gptsmith.data.preferences import PairCounts
from gptsmith.model.gpt import GPTModel
from gptsmith.recipes import finetune, in_loop_eval, loop
from gptsmith.recipes.chat import first_prompt
from gptsmith.recipes.job import TrainingJob
from gptsmith.recipes.options import PreferenceConfig
from gptsmith.recipes.plan import Note
from gptsmith.recipes.reference import TopTokens, prepare_reference
from gptsmith.train import distributed
from gptsmith.train.preference import DEFAULT_BETA, METRICS, PreferenceLoss
from gptsmith.train.runtime import Precision, evaluating

NUM_PROMPTS = 3  # validation questions to answer at each evaluation


def preference(config: PreferenceConfig, started: float | None = None) -> int:
    """`gptsmith finetune preference`; returns the exit code, 0 or loop.STOPPED."""
    base = finetune.base_run(config)
    if config.beta is None:
        config = config.model_copy(update=dict(beta=DEFAULT_BETA[config.loss]))
    prepared = finetune.prepare(config, base, CHAT_TOKENS if base.template is None else ())
    model, tokenizer = prepared.model, prepared.tokenizer
    template = tuning_template(tokenizer, base.template)
    T = finetune.row_length(config.context_length, prepared)
    train, val, notes = load(config, template, T)
    rows, val_rows = (
        PairRows(
            part, config.train.seed, prepared.pad_id, config.pairs_per_step,
            documents=not model.mask.is_causal, shared=finetune.shares_prefixes(model),
        )
        for part in (train, val)
    )  # fmt: skip
    config = finetune.with_samples_per_step(config, ["pairs_per_step"], rows.T, len(train))
    resolved = finetune.resolve(config, prepared, rows)
    config, runtime = resolved.config, resolved.runtime
    rows.fixed = runtime.compile
    assert config.beta is not None
    loss = PreferenceLoss(config.loss, config.beta, config.label_smoothing, config.gamma)
    evaluate_tasks, task_notes = in_loop_eval.prepare(config.eval, model, tokenizer)
    run = finetune.create_run(
        resolved, prepared, template=template.source,
        corpus=train.fingerprint[:32] + val.fingerprint[:32],
        fixed=("context_length", "pairs_per_step", "loss"),
    )  # fmt: skip
    B, top = config.train.batch_size, None
    if config.loss != "simpo":
        parts = {"train": rows, "val": val_rows}
        model.to(runtime.device)  # whole, as in an evaluation, also if it is to be sharded
        try:
            found = prepare_reference(run, config.resume, model, parts, B, runtime.precision)
        except BaseException:
            run.close()
            raise
        rows.reference, val_rows.reference = found.log_probs["train"], found.log_probs["val"]
        top = found.top
        if resolved.is_sharded:
            model.to("cpu")

    def evaluate(limit: int | None) -> Mapping[str, float | int | None]:
        return evaluate_pairs(model, val_rows, B, limit, loss, top, runtime.precision)

    chosen = (val.examples[2 * i] for i in range(min(NUM_PROMPTS, len(val))))
    prompts = [first_prompt(example, template) for example in chosen]
    job = TrainingJob(
        model, loss, rows, evaluate, val.tokens,
        finetune.chat_samples(config.eval, model, tokenizer, template, prompts), evaluate_tasks,
        curves=("accuracy", "margin"), loss_label="loss (per pair)",
    )  # fmt: skip
    return loop.train(run, job, resolved.with_notes([*notes, *task_notes]), started)


def load(
    config: PreferenceConfig, template: ChatTemplate, T: int
) -> tuple[Pairs, Pairs, list[Note]]:
    """Pairs for training, for validation, and notes on them."""
    if finetune.uses_built_in(config):
        counts = PairCounts(T)
        pairs = skill_pairs(config.train.seed, config.questions)
        train = encode_pairs(pairs, template, counts, "--data skills")
    else:
        train, counts = load_pairs(config.data, config, template, T)
    summary = str(counts)
    if config.val:
        val, counts = load_pairs(config.val, config, template, T)
        summary = f"{summary}; for validation: {counts}"
    else:
        try:
            train, val = train.split(config.val_fraction, config.train.seed)
        except ValueError as error:
            where = f"{' '.join(config.data)}: {summary}"
            raise ValueError(f"{where}; {error}: give more, or --val") from None
    share = train.examples.targets / train.tokens
    sizes = (
        f"{len(train):,} training pairs of {train.tokens:,} tokens, {share:.0%} of them the "
        f"answers'; {len(val):,} pairs for validation"
    )
    return train, val, [Note("data", summary), Note("data", sizes)]


def evaluate_pairs(
    model: GPTModel,
    rows: PairRows,
    B: int,
    limit: int | None,
    loss: PreferenceLoss,
    top: TopTokens | None,
    precision: Precision,
) -> dict[str, float | int | None]:
    """val_loss and the loss's metrics, means over the pairs, and val_kl, in nats a token of the
    answers, if the reference's top tokens are given. Ranks take turns with the batches; all get the
    values that one process would get."""
    device = model.head_weight.device
    count, targets, sums = 0, 0, [torch.zeros(2 + len(METRICS), dtype=torch.float64)]
    with evaluating(model, precision):
        for turn, numbers in enumerate(rows.groups(B, limit)):
            batch = rows.of(numbers)
            count += batch.count
            targets += int((batch.targets != IGNORE_INDEX).sum())
            sums.append(torch.zeros_like(sums[0]))
            if turn % distributed.world_size() == distributed.rank():
                batch = batch.to(device)
                summed, metrics = loss(model, batch)
                values = torch.stack([summed, *(metrics[name] for name in METRICS)])
                sums[-1][1:] = values.cpu().double()
                sums[-1][0] = top.divergence(model, batch, numbers) if top else 0
    # batch by batch, and added up here: on any number of ranks in the same order
    total = torch.zeros_like(sums[0])
    for of_batch in distributed.sum_over_ranks(torch.stack(sums)):
        total += of_batch
    names = ("val_loss", *(f"val_{name}" for name in METRICS))
    found = dict(zip(names, (total[1:] / count).tolist(), strict=True))
    return found | ({"val_kl": float(total[0]) / targets} if top else {}) | {"pairs": count}
