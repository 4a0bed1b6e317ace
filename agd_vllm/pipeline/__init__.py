"""From rows to decoded rows: engines, attribution workers and the loop that joins them. Imports `attribution`, `engine`
and below."""
