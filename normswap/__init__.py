"""normswap: replace the BatchNorm layers of a PyTorch network without losing what it has learnt."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from normswap.version import __version__ as __version__

if TYPE_CHECKING:
    from normswap.checks.comparison import verify as verify
    from normswap.checks.verification import Verification as Verification
    from normswap.choosing import choose_recipes as choose_recipes
    from normswap.deploy.folding import Folding as Folding
    from normswap.deploy.folding import fold as fold
    from normswap.deploy.folding import fold_with_report as fold_with_report
    from normswap.deploy.onnx.artifact import ExportArtifact as ExportArtifact
    from normswap.deploy.onnx.export import export_onnx as export_onnx
    from normswap.deploy.rows import FoldRow as FoldRow
    from normswap.errors import NormswapError as NormswapError
    from normswap.exported.program import from_exported as from_exported
    from normswap.initialization.data_dependent import initialize as initialize
    from normswap.initialization.synthetic import synthesize_samples as synthesize_samples
    from normswap.pipeline import Conversion as Conversion
    from normswap.pipeline import convert as convert
    from normswap.pipeline import plan as plan
    from normswap.pipeline import swap_norms as swap_norms
    from normswap.ranking import rank_sites as rank_sites
    from normswap.recipes import Recipe as Recipe
    from normswap.recipes import all_recipes as all_recipes
    from normswap.recipes import make_recipe as make_recipe
    from normswap.records import Choice as Choice
    from normswap.records import InitReport as InitReport
    from normswap.records import Plan as Plan
    from normswap.records import SiteCost as SiteCost
    from normswap.records import SyntheticSamples as SyntheticSamples
    from normswap.report import write_report as write_report
    from normswap.storage.store import load as load
    from normswap.storage.store import save as save
    from normswap.training.checkpoints import migrate_state_dict as migrate_state_dict
    from normswap.training.groups import parameter_groups as parameter_groups
    from normswap.training.optimizers import migrate_optimizer as migrate_optimizer
    from normswap.training.records import OptimizerMigration as OptimizerMigration
    from normswap.training.records import StateDictMigration as StateDictMigration
    from normswap.training.statistics import StatisticsUpdate as StatisticsUpdate
    from normswap.training.statistics import update_statistics as update_statistics

# Each public name and the module that holds it: importing normswap imports none of them, and with them not torch.
_HOMES = {
    "Choice": "records",
    "Conversion": "pipeline",
    "FoldRow": "deploy.rows",
    "Folding": "deploy.folding",
    "ExportArtifact": "deploy.onnx.artifact",
    "InitReport": "records",
    "NormswapError": "errors",
    "OptimizerMigration": "training.records",
    "Plan": "records",
    "Recipe": "recipes",
    "SiteCost": "records",
    "StateDictMigration": "training.records",
    "StatisticsUpdate": "training.statistics",
    "SyntheticSamples": "records",
    "Verification": "checks.verification",
    "all_recipes": "recipes",
    "choose_recipes": "choosing",
    "convert": "pipeline",
    "fold": "deploy.folding",
    "fold_with_report": "deploy.folding",
    "from_exported": "exported.program",
    "export_onnx": "deploy.onnx.export",
    "initialize": "initialization.data_dependent",
    "make_recipe": "recipes",
    "migrate_optimizer": "training.optimizers",
    "migrate_state_dict": "training.checkpoints",
    "parameter_groups": "training.groups",
    "plan": "pipeline",
    "rank_sites": "ranking",
    "load": "storage.store",
    "save": "storage.store",
    "swap_norms": "pipeline",
    "synthesize_samples": "initialization.synthetic",
    "update_statistics": "training.statistics",
    "verify": "checks.comparison",
    "write_report": "report",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'normswap' has no attribute {name!r}")
    return getattr(importlib.import_module(f"normswap.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
