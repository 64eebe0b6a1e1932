"""The value of most scores: a sum over a sum, which for (value, 1) is the mean."""

from typing import Any

import numpy as np
import numpy.typing as npt


def ratio(sums: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """(..., 2) -> (...); NaN, not defined, where the second is 0.

    >>> ratio(np.array([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [0.75, nan]
    """
    top, bottom = np.asarray(sums, dtype=np.float64)[..., 0], np.asarray(sums, dtype=np.float64)[..., 1]
    return np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom != 0)
