"""Published benchmarks as rows with regions, their checkers, a table over strategies, head rankings. Imports `pipeline`
and below; never `reporting`."""
