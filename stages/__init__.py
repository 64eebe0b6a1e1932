"""The verbs of the graph in dvc.yaml: prepare, baseline, train, evaluate."""

import qlora  # noqa: F401 - before any library of a stage: see there what it keeps out
