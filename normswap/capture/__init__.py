"""Capture: read a model's dataflow without touching the model."""

from normswap.capture.symbolic import Capture, Trace, capture_symbolic

__all__ = ["Capture", "Trace", "capture_symbolic"]
