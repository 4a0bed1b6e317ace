"""The commands of `agd-vllm`, a file each; thin layers, imported by `agd_vllm.cli` only."""
