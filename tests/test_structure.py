"""The rules of the code base that a reader relies on, as tests whose failures say what to do.

The import levels are a contract of import-linter (`make lint`); here it is only checked that it names every package.
"""

import ast
import itertools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "indexshare"
SOURCES = sorted(PACKAGE.rglob("*.py"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

LINE_BUDGET = 400
LINE_BUDGETS = {"model/glm.py": 650, "kernels/ops.py": 500}

FORBIDDEN_MODULES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "code"}
FORBIDDEN_BUILTINS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_ATTRIBUTES = {"torch.load", "torch.save", "torch.jit", "torch.package", "torch.hub", "os.system", "os.popen"}
FORBIDDEN_ARGUMENTS = {"trust_remote_code", "allow_pickle"}

ERROR_NAMES = {
    "IndexShareError",
    "ConfigError",
    "CheckpointError",
    "RequestError",
    "MemoryLimitError",
    "OverloadedError",
    "TemplateError",
    "KernelError",
    "TrainingError",
}


def relative_name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=relative_name)
def test_file_reads_in_one_sitting(path: Path) -> None:
    budget = LINE_BUDGETS.get(relative_name(path), LINE_BUDGET)
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert num_lines <= budget, f"{num_lines} lines, budget {budget}: look for the seam and split there"


def dangers(tree: ast.AST) -> Iterator[str]:
    """Whatever in a syntax tree could run code that came with data. `model.eval()` and `re.compile()` are fine."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                found = {name.name for name in names if name.name.split(".")[0] in FORBIDDEN_MODULES}
            case ast.ImportFrom(module=str(module), names=names):
                found = {module} if module.split(".")[0] in FORBIDDEN_MODULES else set()
                found |= {f"{module}.{name.name}" for name in names} & FORBIDDEN_ATTRIBUTES
            case ast.Name(id=name):
                found = {name} & (FORBIDDEN_BUILTINS | FORBIDDEN_ARGUMENTS)
            case ast.Attribute():
                found = {ast.unparse(node)} & FORBIDDEN_ATTRIBUTES
            case ast.keyword(arg=str(name)) | ast.arg(arg=name):
                found = {name} & FORBIDDEN_ARGUMENTS
            case _:
                found = set()
        yield from (f"line {getattr(node, 'lineno', '?')}: {name}" for name in sorted(found))


@pytest.mark.parametrize("path", SOURCES, ids=relative_name)
def test_nothing_executes_data(path: Path) -> None:
    found = list(dangers(ast.parse(path.read_text(encoding="utf-8"))))
    assert not found, f"{found}: see SECURITY.md, 'What is never executed'"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "eval('1')",
        "run = exec",
        "__import__('os')",
        "f(trust_remote_code=True)",
        "def f(*, trust_remote_code): ...",
        "numpy.load(f, allow_pickle=True)",
    ],
)
def test_the_search_for_dangers_finds_them(source: str) -> None:
    assert list(dangers(ast.parse(source)))


def test_the_search_for_dangers_leaves_the_rest_alone() -> None:
    harmless = "model.eval(); re.compile('x'); torch.compile(f); safetensors.torch.load_file(p)"
    assert not list(dangers(ast.parse(harmless)))


def modules_imported_by(statement: str) -> set[str]:
    """Top-level modules that a statement brings into a fresh interpreter."""
    program = (
        f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); before = set(sys.modules); {statement}; "
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_imports_only_the_standard_library() -> None:
    assert modules_imported_by("import indexshare") - sys.stdlib_module_names == {"indexshare"}


def test_importing_the_command_line_imports_no_framework() -> None:
    assert not modules_imported_by("import indexshare.cli") & {"torch", "numpy", "tokenizers", "jinja2"}


def test_public_names_are_frozen() -> None:
    import indexshare

    expected = {"LLM", "__version__", "load"} | ERROR_NAMES
    assert set(indexshare.__all__) == expected, "a public name is a promise: add it here and in CHANGELOG.md on purpose"
    for name in expected:
        assert getattr(indexshare, name) is not None


def test_every_package_has_a_level() -> None:
    contract = next(c for c in PYPROJECT["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    assert contract["exhaustive"]
    levels = {name.strip(" ()") for layer in contract["layers"] for name in re.split(r"[|:]", layer)}
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert levels == modules | packages, "give each package its level in [tool.importlinter] of pyproject.toml"


def test_every_marked_gap_has_an_anchor() -> None:
    """A note about missing work names the issue that will do it, as in `TODO(#12): ...`."""
    marker = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b(?!\(#\d+\))")
    texts = [*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "docs").glob("*.md")]
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in texts
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if marker.search(line)
    ]
    assert not found, f"{found}: name the issue, or do it now"


def read_constraints() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in pins}


def test_constraints_are_exact() -> None:
    for name, pin in read_constraints().items():
        assert [specifier.operator for specifier in pin.specifier] == ["=="], f"constraints.txt: {name} is not exact"


def test_constraints_cover_the_dependencies() -> None:
    project = PYPROJECT["project"]
    declared = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    pins = read_constraints()
    for requirement in map(Requirement, declared):
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement.name} is missing in constraints.txt"
        (exact,) = pin.specifier
        assert requirement.specifier.contains(exact.version), f"constraints.txt: {pin} is outside {requirement}"
