"""The package's import structure."""

import grimp
import networkx

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


def test_no_circles() -> None:
    found = imports()
    assert len(found) > 200
    graph = networkx.DiGraph(found)
    assert [circle for circle in networkx.strongly_connected_components(graph) if len(circle) > 1] == []


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
