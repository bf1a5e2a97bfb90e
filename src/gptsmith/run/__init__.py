"""The run folder, which every stage reads or writes. Only this package knows its layout.

runs/NAME/
  config.yaml            resolved configuration of the stage that wrote it
  model.json             architecture (ModelConfig); also mask.py if the mask is Python code
  tokenizer.json         and special_tokens.json (which tokens begin and end a text), if the
                         model's own files declare it
  chat_template.jinja    chat format of a fine-tuned model
  corpus.json            fingerprint of the training data
  model.safetensors      final weights; the header says which ("last" or "best") and the last step
  checkpoints/           resumable state (train/checkpoint.py), without frozen parameters
  metrics.jsonl ...      the record of training and the files derived from it (train/monitor.py)
  report.md              summary of the run
  digests.json           digests of these files, compared when they are opened (run/digests.py)
  responses.json         instruct: answers to test instructions; verdicts/: of a judge on them
  test.json ...          classify: test-predictions.jsonl, confusion.*, history.*
  .lock                  flock of the process that trains here; contains its id

A run that trains only part of the weights also has these, and with LoRA no model.safetensors:
  tuning.json            which part (model/tuning.py)
  base.safetensors       the weights it started from
  adapter/               LoRA: adapter_config.json, adapter_model.safetensors, in the format of peft
"""

from typing import TYPE_CHECKING, Any

from gptsmith.run.layout import CheckpointName, is_run

if TYPE_CHECKING:
    from gptsmith.run.folder import Run

__all__ = ["CheckpointName", "Run", "is_run"]


def __getattr__(name: str) -> Any:
    if name == "Run":  # needs torch, which configuration and --help must not import
        from gptsmith.run.folder import Run

        return Run
    raise AttributeError(f"module 'gptsmith.run' has no attribute {name!r}")
