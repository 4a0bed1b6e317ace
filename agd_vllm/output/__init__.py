"""Results, errors, relevance and summaries on storage, and in again. Imports `input`, records and faults at most."""
