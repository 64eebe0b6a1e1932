"""Section `data`: which rows become which split."""

from functools import cached_property
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import Field, model_validator

from qlora.params.section import Section


class DataParams(Section):
    train_file: str = Field(min_length=1)
    """Raw rows: a file of parquet, arrow, csv, tsv or JSON, the last three packed by gzip or zstd too, or a folder of them, in sorted order."""
    test_file: str = Field(min_length=1)
    """Like train_file. The same path: the test split is carved out of it by hash."""
    test_fraction: float = Field(gt=0, lt=1)
    """Share carved out for the test split; only read when test_file is train_file."""
    format: Literal["messages", "sharegpt", "alpaca", "prompt_completion"]
    """How a row holds its conversation: see FORMATS in qlora/data/formats."""
    columns: dict[str, str]
    """Names that columns have in the files, by the names that the format knows, such as {instruction: question, output: answer}."""
    weights: dict[str, Annotated[float, Field(ge=0, le=100)]]
    """How often rows of a file of train_file are in the train split, by the file's path in the folder: 0.5 keeps half of them, chosen by the hash of
    their text; 2 has each twice. Files that are not named count once; {}: all do. Predictions are then summed up by file too."""
    system_message: str | None = Field(min_length=1)
    """Given to conversations without a system turn; null leaves them as they are."""
    validation_fraction: float = Field(ge=0, lt=1)
    """Share of the train file held back for the validation loss, by hash of the prompt; 0 means none."""
    on_invalid: Literal["drop", "error"]
    """A conversation that can't be trained on, or that the chat template can't show, is dropped and counted by reason, or ends the run."""

    max_chars: int = Field(gt=0)
    """Characters of a conversation, all messages together, with reasoning, calls and tools. A longer one is invalid and not read further."""
    on_duplicate: Literal["drop", "keep", "error"]
    """A conversation that the train file held before, but for case, width and white space: only the first is kept, all are, or the run ends."""
    max_leakage: float = Field(ge=0, le=1)
    """Share of the test rows whose prompt may occur in the train file, but for case, width and white space."""
    on_leakage: Literal["error", "drop"]
    """More than max_leakage ends the run, with the rows; or those rows are dropped from train and validation, never from test."""
    near_threshold: float | None = Field(ge=0.05, le=1)
    """Jaccard similarity of their word pairs from which on two conversations of at least 20 words are near duplicates; system turns don't
    count. null: none are looked for, which halves the time."""
    max_near_duplicates: float | None = Field(ge=0, le=1)
    """Share of the train file's rows that may nearly repeat an earlier one; more ends the run, with the rows. null: they are only counted."""
    max_near_leakage: float | None = Field(ge=0, le=1)
    """Share of the test rows that the train file may nearly hold. null: they are only counted."""

    @property
    def carves_test(self) -> bool:
        """Whether test is a part of the train file."""
        return PurePosixPath(self.train_file) == PurePosixPath(self.test_file)

    @cached_property
    def carved_fraction(self) -> float:
        """Share of the train file that becomes test; asked for every row."""
        return self.test_fraction if self.carves_test else 0.0

    @model_validator(mode="after")
    def _limits_are_looked_at(self) -> "DataParams":
        for name in ("max_near_duplicates", "max_near_leakage"):
            if self.near_threshold is None and getattr(self, name) is not None:
                raise ValueError(f"{name} = {getattr(self, name):g} needs a near_threshold: with null no near duplicates are looked for")
        return self

    @model_validator(mode="after")
    def _leaves_rows_to_train_on(self) -> "DataParams":
        if self.carves_test and self.test_fraction + self.validation_fraction >= 1:
            raise ValueError(
                f"test_fraction = {self.test_fraction} and validation_fraction = {self.validation_fraction} leave no row "
                "to train on: their sum must be below 1"
            )
        return self
