"""The verbs of the graph in dvc.yaml: prepare, baseline, train, evaluate."""

import qlora  # noqa: F401 - before any library of a stage: see there what it keeps out
from qlora.interruption import die_with_parent

# Before the libraries, which take seconds: a dvc that is killed meanwhile leaves nothing behind.
die_with_parent()
