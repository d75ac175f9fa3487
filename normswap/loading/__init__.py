"""Read models and inputs from the files people have, without running code from the file."""

from normswap.loading.arrays import explain_dtype, load_inputs
from normswap.loading.models import load_model

__all__ = ["explain_dtype", "load_inputs", "load_model"]
