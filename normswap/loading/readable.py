"""Whether a file that is being written can be read again."""

from __future__ import annotations

from typing import BinaryIO

import torch

from normswap.errors import InputError, marked
from normswap.loading.admission import judge
from normswap.loading.scanning import Global, scan_pickle
from normswap.loading.trust import Trust, entry_for

__all__ = ["why_unreadable"]


class _WhateverCanBe(Trust):
    """The trust of a user who vouches for everything that can be vouched for."""

    def covers(self, found: Global) -> bool:
        return entry_for(found) is not None


def why_unreadable(file: BinaryIO) -> str | None:
    """Return why a file by torch.save is refused whatever the user trusts, None where it can be read.

    Nothing of the file is run or imported.
    """
    file.seek(0)
    try:
        judge(scan_pickle(torch._C.PyTorchFileReader(file).get_record("data.pkl")), _WhateverCanBe())
    except InputError as cause:
        return str(marked(cause.message))
    return None
