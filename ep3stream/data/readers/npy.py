"""One .npy file as a memory map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep3stream.data.conversion.batch import reading
from ep3stream.errors import SourceError


def open_array(path: Path) -> NDArray[Any]:
    """The file as a read-only memory map; raises SourceError for objects, pickles and truncated files."""
    with reading(path):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise SourceError(f"{path}: holds several arrays; save x and y as one .npy file each")
    if array.dtype.kind not in "biuf":
        raise SourceError(f"{path}: holds {array.dtype}, not numbers; save it as numbers")
    return array
