"""What a model is, without loading its weights: files, architecture, memory, the demo model. Imports `prompts` and
below."""
