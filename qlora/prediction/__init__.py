"""Answers of a model to the test set, and the likelihood of the references. `baseline` and `predict` run it."""
