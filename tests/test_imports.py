"""Which package may import which. All imports are read, including those inside functions."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

SRC = Path(__file__).resolve().parents[1] / "src" / "gptsmith"

# The layers of the package, top first: a room imports only from the rooms listed for it (and from
# itself). The face is `import gptsmith`, which loads names from many rooms on first use.
GROUND = {"train", "model", "tokenizer", "batch"}
# anyone may use them: durable writes, configuration, a process with limits, the way to the screen
DESK = {
    "files",
    "config",
    "flags",
    "recognize",
    "sandbox",
    "arguments",
    "user_code",
    "terminal",
    "console",
    "progress",
    "compilers",
}
MIDDLE = {"run", "chat_template"} | GROUND | DESK
FLOORS: dict[str, set[str]] = {
    "__main__": {"cli"},
    "face": {"api", "generate", "data"} | MIDDLE,
    "cli": {"face", "flags", "terminal"},
    "api": {"commands", "evaluate", "generate"} | MIDDLE,
    "demo": {"commands", "budget", "recipes", "evaluate", "generate", "data"} | MIDDLE,
    "commands": {"serve", "budget", "recipes", "inspect", "evaluate", "interop", "generate"}
    | {"kernels", "data"}
    | MIDDLE,
    "serve": {"evaluate", "generate"} | MIDDLE,
    "budget": {"recipes", "inspect", "data"} | MIDDLE,
    "recipes": {"evaluate", "generate", "data"} | MIDDLE,
    "inspect": {"kernels", "data"} | MIDDLE,
    "evaluate": {"generate", "kernels", "data"} | MIDDLE,
    "generate": {"kernels"} | MIDDLE,
    "data": {"download"} | MIDDLE,
    "run": {"interop", "chat_template"} | GROUND | DESK,
    "interop": {"download", "chat_template"} | GROUND | DESK,
    "chat_template": GROUND | DESK,
    "sandbox": set(),
    "kernels": {"model", "files", "terminal"},
    "train": {"batch"} | DESK,
    "tokenizer": DESK,
    "model": {"files", "arguments", "user_code", "compilers"},
    "batch": set(),
    "config": {"flags"},
    "download": {"files", "progress"},
    "flags": {"terminal"},
    "console": {"terminal"},
    "terminal": set(),
    "arguments": set(),
    "user_code": set(),
    "files": set(),
    "compilers": set(),
    "recognize": set(),
    "progress": {"console"},
}

# Third-party packages that a machine may lack: imported inside the function that needs them.
OPTIONAL = {
    "accelerate",
    "datasets",
    "gguf",
    "huggingface_hub",
    "llama_cpp",
    "llguidance",
    "lm_eval",
    "mlflow",
    "peft",
    "rouge_score",
    "sacrebleu",
    "tensorboard",
    "torch.utils.tensorboard",
    "trackio",
    "transformers",
    "wandb",
}


class Import(NamedTuple):
    file: Path
    line: int
    name: str  # dotted, absolute, as far as the statement tells
    top: bool  # runs when the module is imported

    def __str__(self) -> str:
        return f"{self.file.relative_to(SRC)}:{self.line} imports {self.name}"


def room(parts: tuple[str, ...]) -> str:
    return "face" if parts in ((), ("__init__",)) else parts[0]


def imports_of(file: Path) -> Iterator[Import]:
    package = ("gptsmith", *file.relative_to(SRC).parent.parts)
    tree = ast.parse(file.read_text(encoding="utf-8"))

    def visit(node: ast.AST, top: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name, top)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, *([node.module] if node.module else [])))
            for alias in node.names:
                yield Import(file, node.lineno, f"{module}.{alias.name}", top)
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module"
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield Import(file, node.lineno, str(node.args[0].value), top)
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.iter_child_nodes(node):
            yield from visit(child, top and not lazy and not typing_only)

    yield from visit(tree, True)


FILES = sorted(SRC.rglob("*.py"))
IMPORTS = [found for file in FILES for found in imports_of(file)]


def room_of(file: Path) -> str:
    return room(file.relative_to(SRC).with_suffix("").parts)


def test_every_package_has_a_level() -> None:
    assert {room_of(file) for file in FILES} <= FLOORS.keys()


def test_no_package_has_two_levels() -> None:
    def below(name: str) -> set[str]:
        return FLOORS[name] | {deep for direct in FLOORS[name] for deep in below(direct)}

    for name in FLOORS:
        assert name not in below(name)


def test_imports_point_downward() -> None:
    wrong = []
    for found in IMPORTS:
        head, *rest = found.name.split(".")
        here = room_of(found.file)
        target = room(tuple(rest)) if rest and rest[0] in FLOORS else "face"
        if head == "gptsmith" and target != here and target not in FLOORS[here]:
            wrong.append(str(found))
    assert not wrong


def test_the_model_needs_torch_and_pydantic_only() -> None:
    allowed = {"torch", "pydantic", "gptsmith"} | sys.stdlib_module_names
    model = [found for found in IMPORTS if room_of(found.file) == "model"]
    assert model
    others = [found for found in model if found.name.split(".")[0] not in allowed]
    # the one exception: the picture of a mask, drawn on request
    picture = [i for i in others if i.file.name == "masks.py" and "matplotlib" in i.name]
    assert not [str(i) for i in others if i not in picture or i.top]


def test_only_two_files_import_torch_distributed() -> None:
    here = {SRC / "train" / name for name in ("distributed.py", "sharding.py")}
    assert {i.file for i in IMPORTS if i.name.startswith("torch.distributed")} <= here
    assert {file for file in FILES if "torch.distributed" in file.read_text("utf-8")} <= here


def test_no_pickle() -> None:
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
    assert not [str(found) for found in IMPORTS if found.name.split(".")[0] in forbidden]
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                call = ast.unparse(node.func)
                if call == "torch.load":  # checkpoints of others: tensors, or not at all
                    assert file == SRC / "interop" / "nanogpt.py"
                    assert "weights_only=True" in ast.unparse(node)
                assert call != "torch.save", f"{file}:{node.lineno}"
                if call in ("np.load", "numpy.load"):
                    keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                    assert keywords.get("allow_pickle", "False") == "False", f"{file}:{node.lineno}"


def test_optional_packages_are_imported_where_they_are_used() -> None:
    early = [
        str(found)
        for found in IMPORTS
        if found.top and any(f"{found.name}.".startswith(f"{name}.") for name in OPTIONAL)
    ]
    assert not early


def test_the_command_starts_with_the_standard_library() -> None:
    top = [i for i in IMPORTS if i.top and room_of(i.file) in ("cli", "__main__", "face")]
    others = [str(i) for i in top if i.name.split(".")[0] not in sys.stdlib_module_names]
    assert all("gptsmith" in other.split("imports ")[1] for other in others)


def test_no_catch_all_or_legacy_modules() -> None:
    assert not [file for file in FILES if file.stem in ("utils", "helpers", "misc", "legacy")]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SRC)))
def test_files_have_at_most_400_lines(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 400
