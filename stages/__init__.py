"""The verbs of the graph in dvc.yaml: prepare, baseline, train, evaluate."""
