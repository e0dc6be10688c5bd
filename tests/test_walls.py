"""Who may know whom. `docs/privacy.md` leans on this: code that is not reachable cannot read what is private."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

WALLS = {  # who: whom it must not reach, through others neither
    "fl_split.errors": ("fl_split",),
    "fl_split.proto": ("fl_split",),
    "fl_split.wire": ("fl_split.model", "fl_split.data", "fl_split.node", "fl_split.trunk", "fl_split.server"),
    "fl_split.model": ("fl_split.data", "fl_split.node", "fl_split.trunk", "fl_split.server", "fl_split.plan"),
    "fl_split.data": ("fl_split.node", "fl_split.trunk", "fl_split.server", "fl_split.plan"),
    "fl_split.plan": ("fl_split.data", "fl_split.node", "fl_split.trunk", "fl_split.server"),
    "fl_split.trunk": ("fl_split.data", "fl_split.node", "fl_split.server", "fl_split.tools"),
    "fl_split.server": ("fl_split.data", "fl_split.node", "fl_split.trunk", "fl_split.tools"),
    "fl_split.node": ("fl_split.trunk", "fl_split.server", "fl_split.tools"),
    "server_app": ("fl_split.data", "fl_split.node", "fl_split.tools"),  # it starts the embedded trunk
    "client_app": ("fl_split.trunk", "fl_split.server", "fl_split.tools"),
}


def import_graph(root: Path) -> dict[str, set[str]]:
    """Each module below `root` and the modules that it names: in an import, wherever it stands, or in a string."""
    files = [*root.glob("*.py"), *(root / "fl_split").rglob("*.py")]
    parts = {file: file.relative_to(root).with_suffix("").parts for file in files}
    modules = {".".join(p[:-1] if p[-1] == "__init__" else p): file for file, p in parts.items()}
    return {name: set(_named(name, file, set(modules))) - {name} for name, file in modules.items()}


def _named(name: str, file: Path, modules: set[str]) -> Iterator[str]:
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:  # a module of a package, or else what the package itself offers
                inner = f"{source}.{alias.name}"
                found += [inner] if inner in modules else [] if alias.name == "__version__" else [source]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
            found = [node.value]  # in a table of names, say
        elif (call := _imports(node)) and isinstance(call[0], ast.Constant):
            near = [word.value for word in call[1:] if isinstance(word, ast.Constant)]
            found = [resolve_name(call[0].value, near[0] if near else package)]
        for each in found:
            yield from {each, each.rpartition(".")[0]} & modules - {"fl_split"} | {each} & modules


def _imports(node: ast.AST) -> list[ast.expr]:
    """The arguments of a call that imports a module by its name; empty for anything else."""
    if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("import_module", "__import__"):
        return [*node.args, *(keyword.value for keyword in node.keywords)]
    return []


def crossings(root: Path, walls: dict[str, tuple[str, ...]]) -> list[str]:
    """Every way over a wall, as the chain of modules that leads there."""
    graph, found = import_graph(root), []
    for who, forbidden in walls.items():
        inside = [name for name in graph if _below(name, who)]
        chains = {name: name for name in inside}
        queue = list(inside)
        for name in queue:  # grows
            for other in sorted(graph[name] - chains.keys()):
                chains[other] = f"{chains[name]} -> {other}"
                queue.append(other)
        found += [
            chain
            for name, chain in chains.items()
            if name not in inside and any(_below(name, other) for other in forbidden)
        ]
    return found


def _below(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_no_party_reaches_over_its_wall() -> None:
    rooms = {name for name in import_graph(ROOT) if _below(name, "fl_split") or name.endswith("_app")}
    assert all(any(_below(name, who) for name in rooms) for who in WALLS)
    assert crossings(ROOT, WALLS) == []


def test_wire_knows_only_errors_and_the_messages() -> None:
    graph = import_graph(ROOT)
    assert graph["fl_split.wire"] == {"fl_split.errors", "fl_split.proto", "fl_split.proto.trunk_pb2"}


@pytest.mark.parametrize(
    ("file", "line", "crossing"),
    [
        ("server_app.py", "from fl_split.node.build import x", "server_app -> fl_split.node.build"),
        ("server_app.py", "def f():\n    import fl_split.node.build", "server_app -> fl_split.node.build"),
        (
            "fl_split/node/trunk_client.py",
            "from fl_split.trunk.published import x",
            "fl_split.node.trunk_client -> fl_split.trunk.published",
        ),
        (
            "fl_split/node/trunk_client.py",
            "from ..trunk import published",
            "fl_split.node.trunk_client -> fl_split.trunk.published",
        ),
        (
            "fl_split/trunk/published.py",
            "if True:\n    from fl_split import helpful",
            "fl_split.trunk.published -> fl_split.helpful -> fl_split.data.rows",
        ),
        ("fl_split/trunk/published.py", "import_module('fl_split.data.rows')", "published -> fl_split.data.rows"),
        ("fl_split/trunk/published.py", "from fl_split import rows", "published -> fl_split -> fl_split.data.rows"),
        ("fl_split/trunk/published.py", "import_module('..data.rows', __package__)", "published -> fl_split.data.rows"),
        ("fl_split/trunk/published.py", "import_module('.data.rows', 'fl_split')", "published -> fl_split.data.rows"),
        ("fl_split/trunk/published.py", "__import__('fl_split').rows", "published -> fl_split -> fl_split.data.rows"),
        (
            "fl_split/trunk/published.py",
            "if TYPE_CHECKING:\n    from fl_split.data.rows import x",
            "published -> fl_split.data.rows",
        ),
    ],
)
def test_a_crossing_is_found(tmp_path: Path, file: str, line: str, crossing: str) -> None:
    tree = {
        "server_app.py": "from fl_split import __version__",
        "fl_split/__init__.py": "NAMES = {'rows': 'fl_split.data.rows'}",
        "fl_split/helpful.py": "def f():\n    from fl_split.data.rows import x",
        "fl_split/data/__init__.py": "",
        "fl_split/data/rows.py": "",
        "fl_split/node/__init__.py": "",
        "fl_split/node/build.py": "from fl_split import helpful",
        "fl_split/node/trunk_client.py": "import json",
        "fl_split/trunk/__init__.py": "",
        "fl_split/trunk/published.py": "from fl_split import __version__",
    }
    for name, text in tree.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert crossings(tmp_path, WALLS) == []
    (tmp_path / file).write_text(f"{tree[file]}\n{line}\n")
    assert any(found.endswith(crossing) for found in crossings(tmp_path, WALLS))


def test_names_of_modules_are_literals_but_for_tables_that_are_searched() -> None:
    found = {
        (str(file.relative_to(ROOT)), ast.unparse(call[0]))
        for file in [*ROOT.glob("*.py"), *(ROOT / "fl_split").rglob("*.py")]
        for node in ast.walk(ast.parse(file.read_text()))
        if (call := _imports(node)) and not isinstance(call[0], ast.Constant)
    }
    assert found == {
        ("fl_split/__init__.py", "_WHERE[name]"),
        ("fl_split/server/trackers.py", "module"),
        ("fl_split/trunk/layers.py", "module"),
    }


def test_every_module_has_its_line_in_the_architecture() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    files = [file.relative_to(ROOT / "fl_split") for file in (ROOT / "fl_split").rglob("*.py")]
    modules = {str(file) for file in files if file.name != "__init__.py"} | {"server_app.py", "client_app.py"}
    assert {line.split("`")[1] for line in text.splitlines() if line.startswith("- `")} == modules


# --------------------------------------------------------------------------------------------------------- start-up

_HEAVY = ("torch", "transformers", "flwr", "ray", "datasets", "peft", "safetensors", "numpy")


def loaded(code: str) -> set[str]:
    """Heavy libraries that a fresh interpreter has loaded after running `code`."""
    script = f"{code}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}} & {{*{_HEAVY}}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("module", ["fl_split", "fl_split.config", "fl_split.trunk.config", "fl_split.cli"])
def test_configuration_loads_no_model_library(module: str) -> None:
    assert loaded(f"import {module}") == set()


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["plan", "--help"],
        ["trunk", "serve", "--help"],
        ["trunk", "token", "add", "a", "--tokens", "TOKENS"],
        ["trunk", "token", "list", "--tokens", "TOKENS"],
        ["trunk", "ping", "127.0.0.1:1", "--timeout-s", "0.01"],
        ["trunk", "describe", "127.0.0.1:1", "--timeout-s", "0.01"],
        ["keys", "authority", "FOLDER"],
    ],
)
def test_a_verb_that_needs_no_model_loads_none(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("[]")
    places = {"TOKENS": str(tmp_path / "tokens"), "FOLDER": str(tmp_path / "keys")}
    arguments = [places.get(word, word) for word in words]
    code = f"from fl_split.cli import app\ntry:\n    app({arguments!r})\nexcept SystemExit:\n    pass"
    assert loaded(code) == set()
