"""The commands of `agd-vllm`, a file each: thin layers over everything below, imported by `agd_vllm.cli` only."""
