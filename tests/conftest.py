"""Settings for every test."""

import os
from pathlib import Path

from hypothesis import settings

# Without a GPU Triton's kernels run in its interpreter, which has to be chosen before anything imports Triton.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Time limits belong to no test: a busy machine must not make one fail.
settings.register_profile("mt_deepspeed", deadline=None)
settings.load_profile("mt_deepspeed")
