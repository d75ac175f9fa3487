"""The house rules that a tool does not check: how long a module and a function may be, and who asks about norms."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "normswap"
TESTS = PACKAGE.parent / "tests"
MODULES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 300, 60
# What only norms/ and nn/ may ask for: everybody else asks the norm (normswap.norms.norm_of, deployed).
NORM_CLASSES = {
    *("GroupNorm", "LayerNorm", "RMSNorm", "LocalResponseNorm", "SyncBatchNorm", "_BatchNorm", "_InstanceNorm"),
    *("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "ChannelAffine", "ChannelLayerNorm", "MeanOnlyBatchNorm"),
    "StreamingNorm",
}
HELPERS = [TESTS / f"{name}.py" for name in ("laws", "conversion_checks", "oracles", "oracle_export")]


def long_functions(source: str) -> list[str]:
    """The functions of more lines than allowed, their docstrings not counted."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            first = node.body[0]
            words = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            docstring = (first.end_lineno or 0) - first.lineno + 1 if words else 0
            if node.end_lineno - node.lineno + 1 - docstring > MOST_LINES_OF_A_FUNCTION:
                found.append(node.name)
    return found


def questions_about_norms(source: str) -> Iterator[str]:
    """Every ``isinstance`` on a class of norms, and every ``getattr(…, "num_groups")``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
            named = {n.attr for n in ast.walk(node.args[1]) if isinstance(n, ast.Attribute)}
            named |= {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
            if node.func.id == "isinstance" and named & NORM_CLASSES:
                yield ast.unparse(node)
            constant = node.args[1]
            if node.func.id == "getattr" and isinstance(constant, ast.Constant) and constant.value == "num_groups":
                yield ast.unparse(node)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_and_its_functions_fit_on_a_few_pages(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MOST_LINES
    assert long_functions(source) == []


def test_a_function_that_is_too_long_is_found() -> None:
    lines = "\n".join(f"    x{i} = {i}" for i in range(MOST_LINES_OF_A_FUNCTION))
    assert long_functions(f"def long():\n{lines}") == ["long"]
    assert long_functions(f'def fits():\n    """{lines}\n    """\n    return 0') == []


@pytest.mark.parametrize("path", [*MODULES, *HELPERS], ids=lambda path: path.stem)
def test_nobody_but_the_norms_asks_what_kind_of_norm_a_module_is(path: Path) -> None:
    if path.relative_to(PACKAGE.parent).parts[:2] not in (("normswap", "norms"), ("normswap", "nn")):
        assert list(questions_about_norms(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    ["isinstance(m, nn.GroupNorm)", "isinstance(m, (nn.Conv2d, _BatchNorm))", 'getattr(m, "num_groups", None)'],
)
def test_a_question_about_norms_is_found(source: str) -> None:
    assert len(list(questions_about_norms(source))) == 1
