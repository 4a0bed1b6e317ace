"""How a row's next tokens are chosen: one file for each strategy, with its options, their checks and their help."""
