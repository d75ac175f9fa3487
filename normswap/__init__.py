"""normswap: replace the BatchNorm layers of a PyTorch network without losing what it has learnt."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from normswap.version import __version__ as __version__

if TYPE_CHECKING:
    from normswap.capture.exported import from_exported as from_exported
    from normswap.conversion import Conversion as Conversion
    from normswap.conversion import convert as convert
    from normswap.conversion import plan as plan
    from normswap.conversion import rank_sites as rank_sites
    from normswap.conversion import swap_norms as swap_norms
    from normswap.errors import NormswapError as NormswapError
    from normswap.exporting import ExportArtifact as ExportArtifact
    from normswap.exporting import export_onnx as export_onnx
    from normswap.folding import Folding as Folding
    from normswap.folding import FoldRow as FoldRow
    from normswap.folding import fold as fold
    from normswap.folding import fold_with_report as fold_with_report
    from normswap.initialization.data_dependent import initialize as initialize
    from normswap.recipes import Recipe as Recipe
    from normswap.recipes import all_recipes as all_recipes
    from normswap.recipes import make_recipe as make_recipe
    from normswap.records import InitReport as InitReport
    from normswap.records import Plan as Plan
    from normswap.records import SiteCost as SiteCost
    from normswap.report import write_report as write_report
    from normswap.storage import load as load
    from normswap.storage import save as save
    from normswap.verification import Verification as Verification
    from normswap.verification import verify as verify

# Each public name and the module that holds it: importing normswap imports none of them, and with them not torch.
_HOMES = {
    "Conversion": "conversion",
    "FoldRow": "folding",
    "Folding": "folding",
    "ExportArtifact": "exporting",
    "InitReport": "records",
    "NormswapError": "errors",
    "Plan": "records",
    "Recipe": "recipes",
    "SiteCost": "records",
    "Verification": "verification",
    "all_recipes": "recipes",
    "convert": "conversion",
    "fold": "folding",
    "fold_with_report": "folding",
    "from_exported": "capture.exported",
    "export_onnx": "exporting",
    "initialize": "initialization.data_dependent",
    "make_recipe": "recipes",
    "plan": "conversion",
    "rank_sites": "conversion",
    "load": "storage",
    "save": "storage",
    "swap_norms": "conversion",
    "verify": "verification",
    "write_report": "report",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'normswap' has no attribute {name!r}")
    return getattr(importlib.import_module(f"normswap.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
