"""Arrays as large as the store that take no memory: they lie in files without a name, which end with the process."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_schemas.errors import StorageFailed
from pipeline.windows import Allocate


def scratch(folder: Path) -> Allocate:
    """Return a function that gives zeroed arrays of a shape and type, mapped from files in `folder`.

    The file has its whole size before it is mapped, so that a full disk is an error here (StorageFailed) and not a
    signal later. Nobody but this process can open it.
    """

    def allocate(shape: Any, dtype: Any) -> npt.NDArray[Any]:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if not size:
            return np.zeros(shape, dtype)
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                os.posix_fallocate(file.fileno(), 0, size)
                return np.memmap(file, dtype=dtype, mode="r+", shape=shape).view(np.ndarray)
        except OSError as error:
            raise StorageFailed(
                f"no room for {size >> 20} MiB beside the store ({error.strerror})", "free space and try again"
            ) from error

    return allocate
