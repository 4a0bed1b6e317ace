"""Evaluation: benchmarks in the format that they are published in, as rows with regions."""
