"""The proof of an export: onnxruntime computes with the file what torch computes with the model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normswap.checks.comparison import TOLERANCES, verify
from normswap.checks.self_check import own_rounding
from normswap.checks.verification import Verification
from normswap.errors import ExportError, InputError, VerificationError, argument, marked

__all__ = ["verified"]


def verified(model: nn.Module, path: Path, trials: dict[str, Any], rtol: float | None) -> Verification:
    """Return one record of the comparisons on all trials; the path in it is the final one."""
    rows = []
    sizes = f"{argument('dynamic_batch', False)} or {argument('dynamic_spatial', False)}"
    fixed = f"pass {sizes} if the model needs a certain size"
    for trial, inputs in trials.items():
        where = f" ({trial})" if trial else ""
        try:
            found = verify(model, path, inputs, rtol=_export_rtol(model) if rtol is None else rtol)
            if rtol is None and not found.ok and (own := 10 * own_rounding(model, inputs)) > found.tolerance:
                found = verify(model, path, inputs, rtol=own)  # the model itself is no more precise
        except InputError as cause:
            raise ExportError(
                f"the export cannot be verified{where}: {marked(cause.message)}",
                code="export-unverified",
                hint=fixed if trial else cause.hint,
            ) from cause
        if not found.ok:
            raise VerificationError(
                f"onnxruntime does not compute what the model does{where}: {found.failure}",
                code="export-mismatch",
                hint=f"nothing was written; {fixed if trial else 'try another opset'}",
            )
        rows += [dataclasses.replace(r, name=r.name + where) for r in found.rows]
    return dataclasses.replace(found, rows=tuple(rows))


def _export_rtol(model: nn.Module) -> float:
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()]
    return 5 * max((TOLERANCES.get(dtype, 0.0) for dtype in dtypes), default=TOLERANCES[torch.float32])
