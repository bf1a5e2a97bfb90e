"""The run folder: what every stage takes and leaves. The only room that knows its layout.

runs/NAME/
  config.yaml            resolved configuration of the stage that wrote it
  model.json             architecture (ModelConfig); mask.py beside it if the mask is code
  tokenizer.json         chat_template.jinja: how a tuned model is talked to
  corpus.json            fingerprint of the data that it is trained on
  model.safetensors      weights at the end of training; its header says which and of what step
  checkpoints/           resumable state (train/checkpoint.py): what is trained, not what is frozen
  metrics.jsonl ...      the record of training and what is drawn from it (train/monitor.py)
  report.md              recipes leave results beside it: responses.json (instruct), test.json,
                         test-predictions.jsonl, confusion.*, history.* (classify); verdicts/ of
                         a judge
  .lock                  flock of the process that trains here; its id inside

A run that trains a part of its weights has two more, and with LoRA no model.safetensors:
  tuning.json            which part (model/tuning.py)
  base.safetensors       the weights that it started from
  adapter/               LoRA: adapter_config.json, adapter_model.safetensors, as peft has them
"""

from gptsmith.run.folder import Run, Which
from gptsmith.run.layout import is_run
from gptsmith.run.stored import stored_recipe

__all__ = ["Run", "Which", "is_run", "stored_recipe"]
