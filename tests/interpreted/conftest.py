"""These tests run in a process of their own (see ../test_triton_kernels.py): Triton interprets either all or nothing.

By hand: TRITON_INTERPRET=1 pytest tests/interpreted
"""

import os

from hypothesis import Phase, settings

collect_ignore_glob = ["test_*.py"]

if os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore_glob = []
    # A failing example is shown as it was found: to look for a smaller one takes minutes here.
    settings.register_profile("interpreted", phases=[Phase.explicit, Phase.reuse, Phase.generate])
    settings.load_profile("interpreted")
