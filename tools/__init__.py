"""Commands a person types, outside the graph."""
