"""These tests run in a process of their own (see ../test_triton_kernels.py): Triton interprets either all or nothing.

By hand: TRITON_INTERPRET=1 pytest tests/interpreted
"""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
