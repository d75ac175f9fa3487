"""What the stages hand to one another: frozen records that print as tables and turn to JSON. No torch here."""

from normswap.records.choices import Choice, SiteChoice
from normswap.records.plans import Plan, Step
from normswap.records.recurrent import RecurrentSite, RecurrentStep
from normswap.records.reports import Agreement, Fit, InitReport, InitRow, SiteCost
from normswap.records.sites import SKIPPED, FoundBy, NormKind, Proof, Site, Skip
from normswap.records.synthetic import SyntheticSamples
from normswap.records.tables import text_table

__all__ = [
    "SKIPPED",
    "Agreement",
    "Choice",
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
    "SiteChoice",
    "SiteCost",
    "Skip",
    "Step",
    "SyntheticSamples",
    "text_table",
]
