"""What every process of the survey needs, imported and used once, in the process from which they are forked."""

from __future__ import annotations

import gc
import os
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers

from benchmarks.survey.case import Case
from benchmarks.survey.examine import examine

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
warnings.simplefilter("ignore")
examine(Case("causal", "llama"))  # imports what torch and transformers import when they are first used
gc.freeze()
