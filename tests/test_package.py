# SPDX-License-Identifier: Apache-2.0
"""The package guards its own shape: who imports whom, sizes, headers, paths."""

import ast
import re
import subprocess
import sys
from importlib.util import resolve_name
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tunix_gemma4"
NAME = PACKAGE.name

# From the bottom up. A module imports its own layer or a lower one, never a higher one.
LAYERS = (
    ("config", "extras", "sharding"),
    ("model",),
    ("checkpoint", "losses"),
    ("data", "lora", "rewards", "sampling", "testing"),
    ("settings",),
    ("plugin",),
    ("recipes",),
    ("planning", "demos"),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

TEXT_SUFFIXES = {".py", ".md", ".cfg", ".toml", ".yaml", ".yml", ".json", ".jinja", ".txt", ""}
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 60


def sources(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_renamed(path):
    return "_renamed" in path.parts


PACKAGE_SOURCES = [path for path in sources(NAME) if not is_renamed(path)]
SHIPPED_SOURCES = [*PACKAGE_SOURCES, *sources("examples", "benchmarks")]
MODULES = {module_name(path): path for path in PACKAGE_SOURCES}


def runtime_nodes(tree):
    """All nodes, except what stands under `if TYPE_CHECKING`; its `else` is run."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and re.fullmatch(
            r"(typing\.)?TYPE_CHECKING", ast.unparse(node.test)
        ):
            node = ast.Module(node.orelse, [])
        yield node
        yield from runtime_nodes(node)


def imported_modules(path, nodes=ast.walk):
    """Dotted names of everything that `path` imports, inside functions and for types too."""
    found = set()
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *(node.module.split(".") if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.add(full if full in MODULES else base)
        elif isinstance(node, ast.Call) and re.search(
            r"\b(import_module|__import__)$", ast.unparse(node.func)
        ):
            named = [*node.args, *(word.value for word in node.keywords)][:1]
            names = [one.value for one in named if isinstance(one, ast.Constant)]
            found.update(resolve_name(name, ".".join(package)) for name in names)
    return found


def imported_roots(path):
    return {name.split(".")[0] for name in imported_modules(path, runtime_nodes)}


def packages(name):
    """Those around a module, which are imported before it."""
    words = name.split(".")
    return {".".join(words[:end]) for end in range(1, len(words))}


def part(name):
    """`checkpoint` for `tunix_gemma4.checkpoint`, `model` for `tunix_gemma4.model.text`."""
    return name.split(".")[1]


def level_of(name):
    return LEVEL[part(name)]


def importers_of(library):
    return {
        path.relative_to(PACKAGE).parts[0]
        for path in sources(NAME)
        if library in imported_roots(path)
    }


def test_only_the_plugin_imports_tunix():
    assert importers_of("tunix") == {"plugin"}


def test_only_the_parity_command_imports_torch():
    assert importers_of("torch") <= {"testing"}


def test_only_parity_tests_import_torch():
    importers = {path for path in sources("tests") if "torch" in imported_roots(path)}
    outside = {path for path in importers if "parity" not in path.relative_to(ROOT).parts}
    assert not outside


def test_imports_go_downwards_only():
    upwards = {
        name: higher
        for name in set(MODULES) - {NAME}
        if (
            higher := {
                other
                for other in imported_modules(MODULES[name])
                if other.split(".")[0] == NAME
                and (other == NAME or level_of(other) > level_of(name))
            }
        )
    }
    assert not upwards


def test_no_modules_import_each_other_in_a_circle():
    """Not for the sake of a type either, and not by way of the package that holds a module."""
    graph = {}
    for name, path in MODULES.items():
        found = imported_modules(path)
        around = {parent for other in found for parent in packages(other)}
        graph[name] = (found | around - packages(name) - {name}) & set(MODULES)
    done = set()

    def visit(name, trail):
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            for other in graph[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_importing_the_package_loads_no_host_and_changes_no_global_setting():
    program = f"""
import sys
import flax
import jax

flags = [name for name in dir(flax.config) if name.startswith(("flax_", "nnx_"))]
assert flags

def settings():
    return dict(jax.config.values), [getattr(flax.config, name) for name in flags]

before = settings()
import {NAME}
{NAME}.ModelConfig, {NAME}.Gemma4ForConditionalGeneration
assert settings() == before
heavy = {{"tunix", "transformers", "torch"}} & set(sys.modules)
assert not heavy, heavy
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert run.returncode == 0, run.stderr


def test_files_and_functions_stay_short():
    texts = {path: path.read_text() for path in SHIPPED_SOURCES}
    assert not {p for p, text in texts.items() if len(text.splitlines()) > MAX_FILE_LINES}
    long = {
        (path, node.name): node.end_lineno - node.lineno + 1
        for path, text in texts.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    }
    assert not long


def test_few_files_lie_at_the_front_door():
    assert len([path for path in PACKAGE.iterdir() if path.is_file()]) <= 10


def test_every_source_file_opens_with_its_license():
    header = "# SPDX-License-Identifier: Apache-2.0\n"
    files = [*SHIPPED_SOURCES, *sources("tests")]
    assert not [path for path in files if not path.read_text().startswith(header)]


def test_what_pyright_must_not_look_at_names_its_rule():
    text = "".join(path.read_text() for path in sources(NAME))
    ignored = re.findall(r"# (?:pyright|type): ?ignore.*", text)
    assert len(ignored) <= 20
    assert all(re.match(r"# pyright: ignore\[\w+(, \w+)*\]", comment) for comment in ignored)


def test_no_file_names_a_path_of_one_machine():
    # Spelled so that this file does not match itself.
    path = re.compile(r"(?:^|[^A-Za-z0-9_.])/(?:work|root|tmp|home)(?=/[a-z])", re.MULTILINE)
    folders = (NAME, "tests", "examples", "configs", "docs", "benchmarks", ".ci")
    files = [*ROOT.glob("*"), *(file for name in folders for file in (ROOT / name).rglob("*"))]
    found = [
        file.relative_to(ROOT)
        for file in files
        if file.is_file()
        and file.suffix in TEXT_SUFFIXES
        and path.search(file.read_text())
        and file.name != ".git"  # In a worktree it is a file.
    ]
    assert not found


PUBLIC = {NAME, *(f"{NAME}.{part}" for part in ("data", "lora", "recipes", "testing"))}


def test_readers_meet_public_names_only():
    """README, docs and examples import from five places."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *sources("examples")]
    imports = re.compile(rf"^\s*(?:from|import) ({NAME}[\w.]*)", re.MULTILINE)
    inner = {
        (path.name, module) for path in pages for module in imports.findall(path.read_text())
    } - {(path.name, module) for path in pages for module in PUBLIC}
    assert not inner


def test_what_github_reads_is_valid():
    """Forms as GitHub's schema wants them: an id once, a label on each input."""
    folder = ROOT / ".github"
    read = {
        p: yaml.safe_load(p.read_text())
        for p in [*folder.rglob("*.yml"), ROOT / ".pre-commit-config.yaml"]
    }
    assert len(read) == 6
    for path in folder.glob("ISSUE_TEMPLATE/*.yml"):
        if path.name == "config.yml":
            continue
        form = read[path]
        assert {"name", "description", "body"} <= form.keys()
        parts = form["body"]
        assert len({part["id"] for part in parts}) == len(parts)
        assert all(part["type"] == "textarea" and part["attributes"]["label"] for part in parts)
    targets = set(re.findall(r"^([\w.$()/-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in folder.glob("workflows/*.yml"):
        steps = [step for job in read[path]["jobs"].values() for step in job["steps"]]
        made = {m for step in steps for m in re.findall(r"^make ([a-z]\S*)", step.get("run", ""))}
        assert made and made <= targets
