"""The verbs of the graph in dvc.yaml: prepare, baseline, train, evaluate."""

import sys

import qlora  # noqa: F401 - before any library of a stage: see there what it keeps out
from qlora.interruption import begin_stage

# Only as a program: `python -m` has not found the module yet.
if sys.argv[0] == "-m":
    begin_stage()
