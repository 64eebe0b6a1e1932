"""Conversations to tokens, packed rows and an adapter, with checkpoints and memory checks. `train` runs it."""
