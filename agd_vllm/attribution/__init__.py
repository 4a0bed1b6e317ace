"""Scorers of candidates by their relevance to a region, and the pool of workers that run them. Imports `kernels`,
`models` and below; never `engine`."""
