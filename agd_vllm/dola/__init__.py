"""DoLa (arXiv 2309.03883) inside vLLM's forward pass: the last layer's distribution against an earlier layer's."""
