import os
import tempfile
from pathlib import Path

# One thread sums in one order, many small tensors are quicker without the others, and there is a process a core. Said
# here, before torch is imported, for commands that tests start too.
os.environ["OMP_NUM_THREADS"] = "1"
# Discs lie there in place of the objects that FID of scenes is taken with, which would have to be fetched.
os.environ["TORCH_HOME"] = str(Path(tempfile.gettempdir(), "atedm-tests"))

import torch

# Without a GPU kernels run in Triton's interpreter, which has to be said before anything imports Triton.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

import diffusers
from diffusers.utils import logging

from atedm.tiny.download import objects_folder
from painted_objects import keep_discs

# Transformers are pruned from a later release on than U-Nets are.
if tuple(map(int, diffusers.__version__.split(".")[:2])) < (0, 40):
    collect_ignore_glob = ["hosts/test_dit_*.py"]

torch.set_num_threads(1)
logging.set_verbosity_error()
logging.disable_progress_bar()
keep_discs(objects_folder())
