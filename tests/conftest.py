import os

import torch

# Without a GPU kernels run in Triton's interpreter, which has to be said before anything imports Triton.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from diffusers.utils import logging

# One thread sums in one order, and many small tensors are quicker without the others.
torch.set_num_threads(1)
logging.set_verbosity_error()
logging.disable_progress_bar()
