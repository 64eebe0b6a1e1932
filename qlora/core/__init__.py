"""Conversations, files, errors, hashes, dvc.lock and versions of packages: what every package may import. All stages run it."""
