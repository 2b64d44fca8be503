"""The package's import structure, and what passes it by; the scripts' as well."""

import ast
import re
from pathlib import Path

import grimp
import networkx

ROOT = Path(__file__).parents[1]
OUTSIDE = {"cli", "eval", "doctor", "testing"}
"""What no server imports."""


def imports() -> list[tuple[str, str]]:
    """Who imports whom, calls inside functions included."""
    graph = grimp.build_graph("vllm_kvcompress", exclude_type_checking_imports=True)
    return [
        (module, target)
        for module in graph.modules
        for target in graph.find_modules_directly_imported_by(module)
    ]


def circles(found: list[tuple[str, str]]) -> list[set[str]]:
    graph = networkx.DiGraph(found)
    return [circle for circle in networkx.strongly_connected_components(graph) if len(circle) > 1]


def test_no_circles() -> None:
    found = imports()
    assert len(found) > 200
    assert circles(found) == []


def test_no_circles_among_scripts() -> None:
    """Files that import their neighbours, calls inside functions included."""
    for folder, least in (
        ("benchmarks", 5),
        ("benchmarks/side_by_side", 20),
        ("examples/shapes", 10),
        ("tests", 50),
    ):
        files = {path.stem: path for path in (ROOT / folder).glob("*.py")}
        found = [
            (name, module.rpartition(".")[2])
            for name, path in files.items()
            for node in ast.walk(ast.parse(path.read_text()))
            for module in modules(node)
        ]
        beside = [(name, target) for name, target in found if target in files]
        assert len(beside) > least, folder
        assert circles(beside) == []


def modules(node: ast.AST) -> list[str]:
    """What an import statement names; of ``from . import a`` the names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        names = [alias.name for alias in node.names]
        return [node.module, *names] if node.module else names
    return []


def test_the_method_knows_neither_models_nor_http() -> None:
    """``policy`` stands alone; kernels, cache and fit see no model, no route and no command."""
    graph = networkx.DiGraph(
        (a.split(".")[1], b.split(".")[1]) for a, b in imports() if "." in a and "." in b
    )
    assert set(graph["policy"]) <= {"policy"}
    for room in ("attention", "cache", "heads"):
        assert not set(graph[room]) & {"models", "serving", "scheduler", "admission", *OUTSIDE}, room


def test_servers_import_no_command() -> None:
    for module, target in imports():
        if target.split(".")[1:2] and target.split(".")[1] in OUTSIDE:
            assert module.split(".")[1] in OUTSIDE, (module, target)


def test_channels_that_no_import_shows_are_listed() -> None:
    """Attributes set by name, globals, private dictionaries, fields of vLLM that carry something of ours."""
    signs = re.compile(
        r"^ *global |[^.]\b[sd]e[tl]attr\((?!struct,|self, name,)|__dict__|\bvars\(|\._kvcompress\b"
        r"|kv_transfer_params|\bREPORT: |static_forward_context|get_forward_context\(\)|os\.environ\[_",
        re.MULTILINE,
    )
    package = ROOT / "vllm_kvcompress"
    found = {
        str(path.relative_to(package)) for path in package.rglob("*.py") if signs.search(path.read_text())
    }
    section = (ROOT / "patches" / "README.md").read_text().split("## Channels that no import shows")[1]
    rows = [line.split(" | ") for line in section.split("\n## ")[0].splitlines() if line.startswith("| ")]
    listed = {name for row in rows[2:] for name in re.findall(r"`([\w/]+\.py)`", row[1])}
    assert found == listed
