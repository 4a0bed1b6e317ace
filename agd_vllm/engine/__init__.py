"""vLLM as a decoder that pauses at gated steps and goes on with the token it is given. Imports `kernels`, `models` and
below; never `attribution`."""
