"""`gptsmith finetune KIND [RECIPE.yaml] --from RUN --data FILE --out RUN2`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from gptsmith import terminal
from gptsmith.commands.pretrain import recipe_config
from gptsmith.recipes.kinds import FINETUNE
from gptsmith.train import distributed
from gptsmith.train.monitor import command_start


def main(argv: Sequence[str], started: float | None = None) -> int:
    """started: see recipes.loop.train; default the start of this process."""
    kind = argv[0] if argv else "--help"
    if kind in ("-h", "--help"):
        kinds = "\n".join(f"  {name:<10} {kind.__doc__}" for name, (kind, _) in FINETUNE.items())
        terminal.say(
            "usage: gptsmith finetune KIND [RECIPE.yaml] --from RUN --data FILE --out RUN2 ...\n"
            f"       (gptsmith finetune KIND --help shows all options)\n\n{kinds}"
        )
        return 0
    if kind not in FINETUNE:
        raise ValueError(f"finetune {kind!r}: choose from {', '.join(FINETUNE)}")
    config_class, recipe = FINETUNE[kind]
    with distributed.connected():
        config = recipe_config(f"finetune {kind}", config_class, argv[1:])
        module, _, name = recipe.partition(":")
        run_recipe = getattr(import_module(module), name)
        code: int = run_recipe(config, command_start() if started is None else started)
        return code
