"""What the README claims, measured; each file prints its figures, `--json` as a list of objects."""
