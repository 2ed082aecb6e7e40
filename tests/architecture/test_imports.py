"""The house stays the house: who imports whom, what is read where, and how long things may grow. Nothing is run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("parallel", "launch", "orchestrator")
TREES = {
    file.relative_to(ROOT).as_posix(): ast.parse(file.read_text(encoding="utf-8"))
    for package in PACKAGES
    for file in sorted((ROOT / package).rglob("*.py"))
}
MAY_IMPORT = {"parallel": {"parallel"}, "launch": {"launch"}, "orchestrator": set(PACKAGES)}

# A library is named in the files that adapt it, and nowhere else.
ADAPTERS = {
    "megatron": (
        *("parallel/provider", "parallel/fused", "parallel/engines/megatron", "parallel/lean_import.py"),
        "orchestrator/bench",
    ),
    "deepspeed": ("parallel/engines/deepspeed",),
    "hydra": tuple(f"orchestrator/config/{name}.py" for name in ("loading", "grid", "multirun")),
    "omegaconf": ("orchestrator/config/loading.py", "orchestrator/config/multirun.py"),
    "peft": ("orchestrator/generate.py", "orchestrator/bench", "orchestrator/certify/outside.py"),
    "transformers": (
        "orchestrator/generate.py",
        "orchestrator/objectives/sft.py",
        "orchestrator/smollm2.py",
        "orchestrator/bench",
        "orchestrator/certify/outside.py",
    ),
    "huggingface_hub": ("orchestrator/models.py",),
    "bitsandbytes": ("parallel/nf4.py",),
    "wandb": ("orchestrator/metrics.py",),
    "fsspec": ("orchestrator/storage.py",),
}
LAZY = {"deepspeed", "hydra", "omegaconf", "peft", "transformers", "huggingface_hub", "wandb", "rich", "bitsandbytes"}
WITHOUT_TORCH = (
    *(f"parallel/{name}.py" for name in ("specs", "topology", "stages", "shards", "capabilities")),
    *(path for path in TREES if path.startswith("parallel/families/")),
)
OPENS_PICKLES = "orchestrator/checkpoint/unpickling.py"
READS_ENVIRONMENT = {"launch/environment.py"}
FILE_LINES, FUNCTION_LINES, PARAMETERS = 400, 60, 8


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    """Every imported module in full, and every ``module.name`` of a ``from`` import, with its statement."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((name.name, node) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"line {node.lineno}: relative import"
            yield node.module, node
            yield from ((f"{node.module}.{name.name}", node) for name in node.names)


def at_import_time(tree: ast.AST) -> ast.Module:
    """What runs when a module is imported: no functions, and no ``if TYPE_CHECKING``."""

    class Keep(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)

    kept = Keep().visit(ast.parse(ast.unparse(tree)))
    assert isinstance(kept, ast.Module)
    return kept


def package(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("path", TREES)
def test_layers_know_only_what_is_below_them(path: str) -> None:
    allowed = MAY_IMPORT[path.split("/")[0]]
    for module, node in imports(TREES[path]):
        owner = package(module)
        assert owner not in PACKAGES or owner in allowed, f"{path}:{node.lineno} imports {module}; allowed: {allowed}"


@pytest.mark.parametrize("library", ADAPTERS)
def test_a_library_is_named_only_where_it_is_adapted(library: str) -> None:
    wrong = [
        f"{path}:{node.lineno}"
        for path, tree in TREES.items()
        if not path.startswith(ADAPTERS[library])
        for module, node in imports(tree)
        if package(module) == library
    ]
    assert not wrong, f"{library} belongs into {ADAPTERS[library]}, and is imported in {wrong}"


def test_heavy_libraries_are_imported_when_they_are_needed() -> None:
    wrong = [
        f"{path}:{node.lineno} {module}"
        for path, tree in TREES.items()
        for module, node in imports(at_import_time(tree))
        if package(module) in LAZY
    ]
    assert not wrong, f"import these inside of the function that needs them: {wrong}"


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    known = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in TREES}
    graph = {
        name: {module for module, _ in imports(at_import_time(TREES[path])) if module in known and module != name}
        for name, path in known.items()
    }
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"imports run in a circle: {' -> '.join(error.args[1])}")


def test_what_is_pure_does_not_need_torch() -> None:
    known = {path.removesuffix(".py").replace("/", "."): path for path in TREES}
    waiting, seen = list(WITHOUT_TORCH), set()
    while waiting:
        path = waiting.pop()
        seen.add(path)
        for module, node in imports(at_import_time(TREES[path])):
            assert package(module) not in ("torch", "numpy"), f"{path}:{node.lineno} imports {module}"
            if module in known and known[module] not in seen:
                waiting.append(known[module])


@pytest.mark.parametrize("path", TREES)
def test_no_globals_and_one_reader_of_the_environment(path: str) -> None:
    for node in ast.walk(TREES[path]):
        assert not isinstance(node, ast.Global), f"{path}:{node.lineno} has a global statement: pass the value on"
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv"):
            assert path in READS_ENVIRONMENT, f"{path}:{node.lineno}: environment variables are for {READS_ENVIRONMENT}"


def test_pickles_are_opened_in_one_file() -> None:
    opens = ("torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler", "pickle._Unpickler", "joblib.load")
    found = {
        path
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in opens
    }
    assert found == {OPENS_PICKLES}, f"pickles are opened in {OPENS_PICKLES}, where no code in them can run: {found}"


@pytest.mark.parametrize("path", TREES)
def test_files_and_functions_stay_short(path: str) -> None:
    lines = (ROOT / path).read_text(encoding="utf-8").count("\n")
    assert lines < FILE_LINES, f"{path} has {lines} lines: split it by subject (limit {FILE_LINES})"
    for node in ast.walk(TREES[path]):
        if not isinstance(node, ast.FunctionDef):
            continue
        length = (node.end_lineno or 0) - node.lineno + 1
        assert length < FUNCTION_LINES, f"{path}:{node.lineno} {node.name} has {length} lines (limit {FUNCTION_LINES})"
        names = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        count = len([name for name in names if name not in ("self", "cls")])
        assert count <= PARAMETERS, f"{path}:{node.lineno} {node.name} takes {count} values: group them in a dataclass"


def test_every_package_is_named_for_the_wheel() -> None:
    import tomllib

    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {Path(path).parent.as_posix().replace("/", ".") for path in TREES}
    assert there <= set(named), f"pyproject.toml [tool.setuptools] packages lacks {sorted(there - set(named))}"
