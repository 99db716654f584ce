"""Bytes: names, schemas and atomic commits of every artifact; knows nothing of learning."""
