"""NumPy's `.npy` files, opened without trust: mapped into memory, never unpickled."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from igpt.errors import InputError
from igpt.files import require_regular


def map_array(path: Path) -> NDArray[Any]:
    """Return the array in a `.npy` file as a read-only memory map.

    Only the header is read. The type, the shape and the order are those of the file: check them
    before use.

    Raises:
        InputError: it is not a regular file, not a `.npy` file, cut off, or holds Python objects.
    """
    require_regular(path)
    try:
        with np.errstate(over="ignore"):  # the product of an absurd shape
            return np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except Exception as error:  # NumPy has many types for malformed headers
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"{path} is not readable as a .npy array ({reason}); is it cut off?"
        ) from None
