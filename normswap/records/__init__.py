"""What the stages hand to one another: frozen records that print as tables and turn to JSON. No torch here."""

from normswap.records.plans import Plan, Step
from normswap.records.recurrent import RecurrentSite, RecurrentStep
from normswap.records.reports import Agreement, Fit, InitReport, InitRow, SiteCost
from normswap.records.sites import SKIPPED, FoundBy, NormKind, Proof, Site, Skip
from normswap.records.tables import text_table

__all__ = [
    "SKIPPED",
    "Agreement",
    "Fit",
    "FoundBy",
    "InitReport",
    "InitRow",
    "NormKind",
    "Plan",
    "Proof",
    "RecurrentSite",
    "RecurrentStep",
    "Site",
    "SiteCost",
    "Skip",
    "Step",
    "text_table",
]
