"""A row to tokens and token weights: chat templates, tokenizer, regions, dry run. Imports `input` and the records."""
