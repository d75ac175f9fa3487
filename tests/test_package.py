"""The package as a whole: who imports whom, what is public, what the command line may load."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from zoo_packages import import_timm, import_torchvision, nms

import normswap

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "normswap"

# Top to bottom: a module imports only from the lines below its own. The stages stand in the pipeline's order,
# the last one first. A folder (graph, recipes, ...) is one line: its files may import each other.
LAYERS = [
    "__main__",
    "cli",
    "demo",
    "__init__",
    "report",
    "pipeline",
    "choosing",
    "ranking",
    "preparation",
    "training",
    "deploy",
    "storage",
    "loading",
    "initialization",
    "stages",
    "checks",
    "exported",
    "graph",
    "runs",
    "recipes",
    "weights",
    "norms",
    "operations",
    "nn",
    "records",
    "options",
    "errors",
    "discovery",
    "version",
]

# The one module that may import a heavy package.
OWNERS = {
    "onnx": "deploy",
    "onnxscript": "deploy",
    "onnx_ir": "deploy",
    "onnxruntime": "checks",
}


def imported_names(source: str, package: str) -> Iterator[str]:
    """Yield the full name of everything that ``source`` imports, wherever in it, as a module of ``package``.

    ``from . import planning`` yields normswap.stages.planning, ``from .planning import x`` normswap.stages.planning.x.
    """
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = importlib.util.resolve_name("." * level, package) if level else ""
                prefix = ".".join(filter(None, (base, module)))
                yield from (f"{prefix}.{alias.name}" for alias in names)
            case ast.Call(
                func=ast.Name("import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(str(name)), *_],
            ):
                yield importlib.util.resolve_name(name, package)


def layer_of(name: str) -> str:
    """Return the line of the table on which the module or object ``name`` stands."""
    first = name.split(".")[1] if "." in name else "__init__"
    return first if first in LAYERS else "__init__"  # `from normswap import __version__`


def wrong_imports(layer: str, package: str, source: str) -> list[str]:
    """Return what a module of ``layer`` must not import: what stands above it or has another owner."""
    wrong = []
    for name in imported_names(source, package):
        top = name.split(".")[0]
        if top == "normswap":
            target = layer_of(name)
            if target != layer and LAYERS.index(target) < LAYERS.index(layer):
                wrong.append(name)
        elif OWNERS.get(top, layer) != layer:
            wrong.append(name)
    return wrong


def modules() -> Iterator[tuple[Path, str, str]]:
    """Yield (file, layer, package) for each module of normswap."""
    for path in sorted(PACKAGE.rglob("*.py")):
        inside = path.relative_to(PACKAGE)
        yield path, inside.parts[0].removesuffix(".py"), ".".join(["normswap", *inside.parts[:-1]])


def test_every_module_has_a_line_in_the_table() -> None:
    assert {layer for _, layer, _ in modules()} == set(LAYERS)


@pytest.mark.parametrize(
    ("path", "layer", "package"), [pytest.param(*m, id=str(m[0].relative_to(PACKAGE))) for m in modules()]
)
def test_imports_point_downward_and_heavy_packages_have_one_owner(path: Path, layer: str, package: str) -> None:
    assert wrong_imports(layer, package, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("layer", "package", "source"),
    [
        ("graph", "normswap", "from normswap.stages.planning import plan"),
        ("graph", "normswap", "from normswap import stages"),
        ("graph", "normswap", "import normswap.stages.planning as p"),
        ("graph", "normswap", "from .stages import plan"),
        ("graph", "normswap", "from . import stages"),
        ("graph", "normswap", "def late():\n    from . import stages"),
        ("graph", "normswap", "import importlib\nimportlib.import_module('.stages', __package__)"),
        ("graph", "normswap.graph", "from ..stages import match"),
        ("graph", "normswap.graph", "from .. import stages"),
        ("recipes", "normswap.recipes", "from normswap import swap_norms"),
        ("errors", "normswap", "import normswap"),
        ("stages", "normswap", "import onnx"),
        ("deploy", "normswap", "from onnxruntime import InferenceSession"),
        ("checks", "normswap", "import onnxscript.rewriter"),
    ],
)
def test_an_import_that_points_upward_or_sideways_is_found(layer: str, package: str, source: str) -> None:
    assert len(wrong_imports(layer, package, source)) == 1


@pytest.mark.parametrize(
    ("layer", "package", "source"),
    [
        ("stages", "normswap", "from .graph import match\nfrom . import records"),
        (
            "graph",
            "normswap.graph",
            "from .ops import classify\nfrom . import recorded\nfrom ..errors import X",
        ),
        ("deploy", "normswap", "import onnx, onnxscript, onnx_ir, torch.onnx"),
        ("graph", "normswap", "import torch.onnx"),
        ("cli", "normswap", "from normswap import __version__, convert"),
    ],
)
def test_an_allowed_import_is_left_alone(layer: str, package: str, source: str) -> None:
    assert wrong_imports(layer, package, source) == []


def loaded_modules(*arguments: str) -> set[str]:
    """Return the names of all modules that ``python arguments`` imports."""
    command = [sys.executable, "-X", "importtime", *arguments]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return set(re.findall(r"^import time:[ \d|]+\| +(\S+)$", result.stderr, flags=re.MULTILINE))


def test_help_loads_neither_torch_nor_onnx() -> None:
    loaded = loaded_modules("-m", "normswap", "--help")
    assert {"normswap", "normswap.cli", "typer"} <= loaded  # the list was read
    assert loaded.isdisjoint({"torch", "numpy", *OWNERS})


def test_records_and_errors_need_no_torch() -> None:
    loaded = loaded_modules("-c", "import normswap.records, normswap.errors")
    assert {"normswap.records", "normswap.errors"} <= loaded
    assert loaded.isdisjoint({"torch", "numpy", *OWNERS})


def test_a_loaded_torch_is_seen() -> None:
    assert "torch" in loaded_modules("-c", "import torch")


def test_every_public_name_resolves_and_is_no_submodule() -> None:
    assert normswap.__all__
    submodules = {module.name for module in pkgutil.iter_modules(normswap.__path__)}
    assert submodules.isdisjoint(normswap.__all__)
    for name in submodules - {"__main__"}:
        importlib.import_module(f"normswap.{name}")
    for name in normswap.__all__:  # after the imports: each has set an attribute of its own name
        assert not isinstance(getattr(normswap, name), ModuleType), name


def test_public_names_are_listed_once_and_shown_by_dir() -> None:
    assert len(set(normswap.__all__)) == len(normswap.__all__)
    assert set(normswap.__all__) <= set(dir(normswap))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_verb"):
        _ = normswap.no_such_verb


def test_the_wheel_gets_the_version_that_the_package_states() -> None:
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    assert re.findall(r'^version = "(.+)"$', project, flags=re.MULTILINE) == [normswap.__version__]


def test_the_installed_distribution_has_the_version_that_the_package_states() -> None:
    try:
        installed = importlib.metadata.version("normswap")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("normswap is imported from its folder, not installed")
    assert installed == normswap.__version__


def test_torchvision_and_timm_can_be_imported_on_any_torch() -> None:
    assert import_torchvision().models.resnet18().fc.out_features == 1000
    assert import_timm().create_model("resnet18").fc.out_features == 1000


def test_the_stand_in_for_nms_drops_only_what_overlaps_a_better_box() -> None:
    boxes = torch.tensor([[0.0, 0.0, 2.0, 1.0], [0.0, 0.0, 3.0, 1.0], [5.0, 5.0, 6.0, 6.0], [0.0, 0.0, 1.0, 1.0]])
    scores = torch.tensor([0.6, 0.9, 0.7, 0.5])
    # With box 1 in place: box 0 overlaps it by 2/3 and box 3 by 1/3; box 2 lies apart.
    assert nms(boxes, scores, 0.5).tolist() == [1, 2, 3]
    assert nms(boxes, scores, 0.7).tolist() == [1, 2, 0, 3]
    assert nms(boxes, scores, 0.3).tolist() == [1, 2]
