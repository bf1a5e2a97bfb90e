"""A LoRA run as a server reads it."""

from pathlib import Path

import pytest
import torch
from api_server import served, serving_models
from exported import SMALL, lora_run

from gptsmith.model.config import ModelConfig


def test_a_lora_run_is_served_merged(tmp_path: Path) -> None:
    run = lora_run(tmp_path / "tuned", ModelConfig(**SMALL), [])
    prompt = run.tokenizer.encode("The quick brown fox jumps over the lazy dog")
    with serving_models({"tuned": served(run, "tuned")}) as api:
        body = dict(prompt=prompt, max_tokens=0, echo=True, logprobs=0)
        [choice] = api.post("/v1/completions", **body)["choices"]
    found = choice["logprobs"]["token_logprobs"][1:]
    with torch.no_grad():
        tuned, base = (
            model(torch.tensor([prompt]))[0, :-1, : run.tokenizer.vocab_size]  # without padding
            .log_softmax(-1)
            .gather(1, torch.tensor(prompt[1:])[:, None])
            .squeeze(1)
            .tolist()
            for model in (run.load_model(), run.base_model())
        )
    assert found == pytest.approx(tuned, abs=1e-4)
    assert found != pytest.approx(base, abs=0.1)
