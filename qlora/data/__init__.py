"""Raw rows to conversations: formats, cleaning, duplicates, leaks and splits. `prepare` runs it."""
