"""Measures of a classifier and of pseudo-labels."""
