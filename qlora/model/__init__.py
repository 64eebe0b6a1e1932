"""The base model, its chat template and the adapter on a device or several. `baseline`, `train` and `predict` run it."""
