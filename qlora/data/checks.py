"""What a row alone does not show: that it came before, or that the test split holds its prompt."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from qlora.core.errors import InputError
from qlora.data.cleaning import Cleaned, Part
from qlora.data.duplicates import Leakage, SeenKeys
from qlora.data.near_duplicates import NearDuplicates
from qlora.params.data import DataParams

logger = logging.getLogger(__name__)


class Checks:
    """Looks at every batch, the test file's first, before it is written."""

    def __init__(self, data: DataParams) -> None:
        self._data = data
        self._seen = SeenKeys()
        self._leakage = Leakage()
        self._near = NearDuplicates(data.near_threshold) if data.near_threshold is not None else None
        self._near_record: dict[str, int] | None = None
        self._duplicates = 0
        self._train_rows = self._test_rows = 0

    def apply(self, cleaned: Cleaned) -> None:
        """Take out of the parts what must not be written."""
        for split, part in cleaned.parts.items():
            # Carved out of the train file, the test split is as free of duplicates, and holds no prompt of train.
            if split != "test" or self._data.carves_test:
                self._apply_duplicates(cleaned.path, part)
            if not self._data.carves_test:
                self._apply_leakage(split, cleaned.path, part)
            if split != "test":
                self._train_rows += len(part.rows)
            else:
                self._test_rows += len(part.rows)
            if self._near is not None:
                self._near.add(split, cleaned.path, part.rows, part.ends, part.bands, more=len(part.repeated()))

    def _apply_duplicates(self, path: Path, part: Part) -> None:
        repeated = self._seen.repeated(part.texts)
        self._duplicates += len(repeated)
        if repeated and self._data.on_duplicate == "error":
            raise InputError("data-duplicate", f"{path}: row {part.rows[repeated[0]]} came before: take it out or set data.on_duplicate to drop")
        if self._data.on_duplicate == "drop":
            part.drop(repeated, "duplicate")

    def _apply_leakage(self, split: str, path: Path, part: Part) -> None:
        if split == "test":
            self._leakage.add_test(part.prompts, part.rows, path)
            return
        leaked = self._leakage.leaked(part.prompts)
        for position in leaked:
            self._leakage.add_leak(part.prompts[position], part.rows[position], path)
        if self._data.on_leakage == "drop":
            part.drop(leaked, "leaked")

    def require_no_leakage(self) -> None:
        found, rows = self._leakage.leaked_test_rows, self._test_rows
        if self._data.on_leakage == "error" and _above(self._data.max_leakage, found, rows):
            raise InputError(
                "data-leakage",
                f"the train file holds the prompts of {found} of {rows} test rows, a share of {found / rows:.4g}; "
                f"data.max_leakage is {self._data.max_leakage:g}:\n{self._leakage.listed()}\n"
                "Take them out of one file, set data.on_leakage to drop (from train), or raise data.max_leakage.",
            )

    def require_no_near_duplicates(self, files: Mapping[str, BinaryIO]) -> None:
        """Look for near duplicates in what was written, by split; show those that the params allow.

        Raises:
            InputError: more of them than data.max_near_duplicates or data.max_near_leakage.
        """
        if self._near is None:
            return
        duplicates, leaks = self._near.find(files)
        self._near_record = {
            "compared": len(self._near),
            "too_short": self._near.too_short,
            "duplicates": len(duplicates),
            "leaked_test_rows": len(leaks),
        }
        threshold = f"data.near_threshold: {self._data.near_threshold:g}"
        repeated = (
            f"{len(duplicates)} of {self._train_rows} rows of the train file nearly repeat an earlier one ({threshold}):\n{_listed(duplicates)}"
        )
        leaked = f"{len(leaks)} of {self._test_rows} test rows are nearly in the train file ({threshold}):\n{_listed(leaks)}"
        if _above(self._data.max_near_duplicates, len(duplicates), self._train_rows):
            raise InputError("data-near-duplicates", f"{repeated}\nTake them out, or raise data.max_near_duplicates; null only counts them.")
        if _above(self._data.max_near_leakage, len(leaks), self._test_rows):
            raise InputError("data-near-leakage", f"{leaked}\nTake them out of one file, or raise data.max_near_leakage; null only counts them.")
        for shown in [repeated] * bool(duplicates) + [leaked] * bool(leaks):
            logger.info("%s", shown)

    def record(self) -> dict[str, Any]:
        return {"duplicates": self._duplicates, "leakage": {"test_rows": self._leakage.leaked_test_rows}, "near": self._near_record}


def _above(limit: float | None, found: int, rows: int) -> bool:
    return limit is not None and found > 0 and found / rows > limit


def _listed(lines: Sequence[object], limit: int = 10) -> str:
    more = [f"  and {len(lines) - limit} more"] if len(lines) > limit else []
    return "\n".join([*map(str, lines[:limit]), *more])
