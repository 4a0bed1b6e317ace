from agd_vllm.cli import main

main()
