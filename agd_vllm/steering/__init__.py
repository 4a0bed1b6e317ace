"""Steering inside vLLM's forward pass: vectors from pairs of answers, their file, model classes that add them."""
