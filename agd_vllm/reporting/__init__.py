"""`agd-vllm report`: a run as one HTML file. Reads run directories and a tokenizer; loads no model."""
