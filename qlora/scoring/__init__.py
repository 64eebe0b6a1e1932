"""Predictions to scores, intervals and the report page. `evaluate` runs it; no model, no torch."""
