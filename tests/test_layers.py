"""Layers: each folder of the package imports only those before it, and no module imports one that imports it."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("common", "geometry", "attention", "model", "data", "training", "app")
# Kernels stand outside the folders: those that build the list are of the layer of geometry.
KERNELS = dict.fromkeys(("images", "launch", "device_functions"), "geometry")


def modules(folder: str, package: str) -> dict[str, Path]:
    files = {}
    for path in (ROOT / folder).rglob("*.py"):
        parts = path.relative_to(ROOT / folder).with_suffix("").parts
        if "kernels" not in parts:
            files[".".join((package, *parts)).removesuffix(".__init__")] = path
    return files


PACKAGE = modules("crystalformer", "crystalformer") | modules("kernels", "crystalformer.kernels")


def imports(name: str, files: dict[str, Path]) -> set[str]:
    """The modules that a module imports, wherever in it; not those that only types are taken from."""
    tree = ast.parse(files[name].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    package = name if files[name].name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            start = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            base = ".".join(x for x in (start, node.module) if x)
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {x if x in files else base for x in names}
    return found & set(files)


def layer(name: str) -> int:
    """The number of a module's layer; what stands at the top of the package is above all."""
    _, _, inner = name.partition(".")
    folder, _, module = inner.partition(".")
    folder = KERNELS.get(module, "attention") if folder == "kernels" else folder
    return LAYERS.index(folder) if folder in LAYERS else len(LAYERS)


@pytest.mark.parametrize("name", sorted(PACKAGE))
def test_imports_only_layers_before(name):
    above = {x for x in imports(name, PACKAGE) if layer(x) > layer(name)}
    assert not above, f"{name} must not import {sorted(above)}"


@pytest.mark.parametrize("files", [PACKAGE, modules("bench", "bench")], ids=["crystalformer", "bench"])
def test_no_circles(files):
    graph = {name: imports(name, files) for name in files}
    assert sum(map(len, graph.values())) > len(graph)  # the imports were found
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle
    assert set(order) == set(files)


def test_every_folder_is_a_layer():
    folders = {path.name for path in (ROOT / "crystalformer").iterdir() if (path / "__init__.py").is_file()}
    assert folders == {*LAYERS, "kernels"}
