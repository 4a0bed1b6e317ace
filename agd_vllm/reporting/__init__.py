"""A run as one HTML file, without loading a model. Imports `pipeline` and below; never `evaluation`."""
