"""Input files to typed rows: formats, schema, ids seen before, fingerprints. Imports the records only."""
