"""Speed, memory and exactness of softhooks, compared with PEFT and the bare frozen model.

`python -m benchmarks` measures everything in one run; see `benchmarks/README.md`.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here comes from a network
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages would tear the progress bars
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # and so would the allocator's, while it is watched
