"""The verbs of the graph in dvc.yaml: prepare, predict (run as baseline and predict), train, evaluate."""

import gc
import sys

import qlora  # noqa: F401 - before any library of a stage: see there what it keeps out
from qlora.runtime.signals import handle_early_signals

# Only as a program: `python -m` has not found the module yet.
if sys.argv[0] == "-m":
    handle_early_signals()
    # What is imported stays: looking through it for garbage, again and again, is a fifth of a stage's start. `command.run` enables it.
    gc.disable()
    if {"stages.predict", "stages.train"} & set(sys.orig_argv):
        from qlora.runtime.imports import hide_unused_libraries

        hide_unused_libraries()
