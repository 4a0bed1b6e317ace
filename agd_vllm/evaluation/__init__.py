"""Evaluation: published benchmarks as rows with regions, their checkers, a table over strategies, and head rankings."""
