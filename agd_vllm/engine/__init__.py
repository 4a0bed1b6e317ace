"""vLLM as a decoder that pauses at gated steps and resumes with the token it is given."""
