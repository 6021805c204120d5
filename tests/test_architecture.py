"""The shape of the project: imports run one way, and nothing outside its own folder knows a method's name."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from peftctl import methods, objectives

PACKAGE = Path(methods.__file__).parent.parent
# lower layers first; a module may import from its own layer and from those below it
LAYERS = [
    ["errors", "threads", "imports", "row", "task", "skeleton", "qkv", "functions", "memory"],
    ["batch", "surgery"],
    ["kernels"],
    ["methods", "metrics", "rewards", "objectives"],
    ["located", "composed", "blame", "schema", "evaluable", "recipe", "storage", "lock"],
    ["base", "data", "fuse", "head", "scores", "seq2seq", "routing", "policy", "layout", "formats"],
    [
        "model",
        "adapter",
        "checkpoint",
        "compute",
        "counting",
        "display",
        "folding",
        "generation",
        "joined",
        "lazy",
        "merge",
        "distributed",
        "launch",
        "opened",
        "optim",
        "report",
        "signals",
        "file_weights",
        "waiting",
        "walk",
    ],
    ["sampling"],
    ["guards", "watch", "gathered"],
    ["states", "frozen"],
    ["trainer"],
    [
        "answered",
        "named",
        "standin",
        "plan",
        "room",
        "run_folder",
        "evaluation",
        "scored",
        "exporting",
        "jobs",
        "kept",
        "loading",
        "remembered",
        "proof",
        "merging",
        "penalty",
        "profile",
        "reading",
        "reference",
        "reuse",
        "rollouts",
        "feeding",
        "run",
    ],
    ["commands", "cli"],
]
TORCH_FREE = ["errors", "row", "skeleton", "qkv", "recipe", "base", "model", "cli", "methods", "objectives", "data"]


def modules() -> dict[str, ast.Module]:
    return {str(p.relative_to(PACKAGE)): ast.parse(p.read_text("utf-8")) for p in PACKAGE.rglob("*.py")}


def layer(part: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if part in names)


def part_of(path: str) -> str:
    return path.split("/")[0].removesuffix(".py")


def imported(tree: ast.AST) -> set[str]:
    """Parts of the package that a module imports at run time, wherever it does."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("peftctl"):
            parts = node.module.split(".")[1:]
            names |= {parts[0]} if parts else {alias.name for alias in node.names}
    return names


def without_type_checking(tree: ast.Module) -> ast.Module:
    body = [n for n in tree.body if not (isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test))]
    return ast.Module(body=body, type_ignores=[])


def test_imports_run_one_way() -> None:
    wrong = [
        f"{path} imports {name}"
        for path, tree in modules().items()
        if path != "__init__.py"
        for name in imported(without_type_checking(tree)) - {"__version__"}
        if layer(name) > layer(part_of(path))
    ]
    assert not wrong


def test_methods_import_neither_objectives_nor_each_other() -> None:
    for path, tree in modules().items():
        parts = path.split("/")
        if parts[0] != "methods" or len(parts) < 3:
            continue
        others = [n for n in methods.names() if n.replace("-", "_") != parts[1]]
        text = ast.unparse(tree)
        assert "peftctl.objectives" not in text
        assert not [n for n in others if f"peftctl.methods.{n.replace('-', '_')}" in text], path


@pytest.mark.parametrize("name", methods.names())
def test_a_methods_name_stands_in_its_own_folder_only(name: str) -> None:
    word = re.compile(rf"(?i){name.replace('-', '[-_ ]?')}(?!e[sd]?\b|ing\b)\b")
    allowed = {"methods", "formats"}
    found = [
        f"{path}:{number}"
        for path in (str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob("*.py"))
        if path.split("/")[0] not in allowed
        for number, line in enumerate((PACKAGE / path).read_text("utf-8").splitlines(), 1)
        if word.search(line) and name not in ("full", "head", "prefix", "prompt")  # English words as well
    ]
    assert not found


ALSO = {"reward", "token-classification"}  # names of a metric and of a task as well


@pytest.mark.parametrize("name", sorted({*objectives.names()} - ALSO))
def test_an_objectives_name_stands_in_its_own_file_only(name: str) -> None:
    """So a new one takes its file, its recipe and its test."""
    word = re.compile(rf"(['\"]){re.escape(name)}\1")  # as code would name it
    own = PACKAGE / "objectives" / f"{name.replace('-', '_')}.py"
    assert not [path for path in PACKAGE.rglob("*.py") if path != own and word.search(path.read_text("utf-8"))]


def test_what_answers_at_once_imports_no_torch() -> None:
    imports = ", ".join(f"peftctl.{name}" for name in TORCH_FREE)
    every = "; ".join(f"peftctl.methods.get({n!r})" for n in methods.names())
    code = (
        f"import sys, {imports}; import peftctl.objectives; {every}; "
        "[peftctl.objectives.get(n) for n in peftctl.objectives.names()]; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_pickle_and_no_shell() -> None:
    forbidden = re.compile(
        r"import pickle|torch\.load\(|torch\.save\(|shell=True|os\.system|yaml\.load\(|(?<![.\w])(eval|exec)\("
    )
    for path, tree in modules().items():
        assert not forbidden.search(ast.unparse(tree)), path
