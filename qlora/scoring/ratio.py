"""The value of most scores: a sum over a sum, which for (value, 1) is the mean."""

from typing import Any

import numpy as np
import numpy.typing as npt


def ratio(sums: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """(..., 2) -> (...); 0 where the second is 0.

    >>> ratio(np.array([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [0.75, 0.0]
    """
    top, bottom = np.asarray(sums, dtype=np.float64)[..., 0], np.asarray(sums, dtype=np.float64)[..., 1]
    return np.divide(top, bottom, out=np.zeros_like(top), where=bottom != 0)
