"""Entry point of a Ray job: `ray job submit --working-dir . -- python jobs/decode.py INPUT... --output DIR --model M`.

Takes the options of `agd-vllm decode` and joins the cluster that runs the job.
"""

import sys
from pathlib import Path

# A job's working directory is the checkout, which need not be installed on the cluster.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from agd_vllm.cli import main

if __name__ == "__main__":
    main(["decode", *sys.argv[1:]])
