import os

# One thread sums in one order, many small tensors are quicker without the others, and there is a process a core. Said
# here, before torch is imported, for commands that tests start too.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

# Without a GPU kernels run in Triton's interpreter, which has to be said before anything imports Triton.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from diffusers.utils import logging

torch.set_num_threads(1)
logging.set_verbosity_error()
logging.disable_progress_bar()
