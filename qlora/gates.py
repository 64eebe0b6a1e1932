"""What a row alone does not show: that it came before, or that the test split holds its prompt."""

from typing import Any

from qlora.cleaning import Cleaned
from qlora.duplicates import Leakage, SeenKeys
from qlora.errors import InputError
from qlora.params.data import DataParams


class Gates:
    """Looks at every batch, the test file's first, before it is written."""

    def __init__(self, data: DataParams) -> None:
        self._data = data
        self._seen = SeenKeys()
        self._leakage = Leakage()
        self._duplicates = 0

    def apply(self, cleaned: Cleaned) -> None:
        """Take out of the parts what must not be written."""
        for split, part in cleaned.parts.items():
            if split == "test":
                self._leakage.add_test(part.prompts, [f"{cleaned.path}: row {row}" for row in part.rows])
                continue
            repeated = self._seen.repeated(part.texts)
            self._duplicates += len(repeated)
            if repeated and self._data.on_duplicate == "error":
                raise InputError(
                    "data-duplicate",
                    f"{cleaned.path}: row {part.rows[repeated[0]]} came before in the file: take it out or set data.on_duplicate to drop",
                )
            if self._data.on_duplicate == "drop":
                part.drop(repeated, "duplicate")
            leaked = self._leakage.leaked(part.prompts)
            for position in leaked:
                self._leakage.add_leak(part.prompts[position], f"{cleaned.path}: row {part.rows[position]}")
            if self._data.on_leakage == "drop":
                part.drop(leaked, "leaked")

    def require_no_leakage(self) -> None:
        found, rows = self._leakage.leaked_test_rows, self._leakage.test_rows
        if self._data.on_leakage == "error" and found / rows > self._data.max_leakage:
            raise InputError(
                "data-leakage",
                f"the train file holds the prompts of {found} of {rows} test rows, a share of {found / rows:.4g}; "
                f"data.max_leakage is {self._data.max_leakage:g}:\n{self._leakage.listed()}\n"
                "Take them out of one file, set data.on_leakage to drop (from train), or raise data.max_leakage.",
            )

    def record(self) -> dict[str, Any]:
        return {"duplicates": self._duplicates, "leakage": {"test_rows": self._leakage.leaked_test_rows}}
