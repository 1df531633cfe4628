import torch
from diffusers.utils import logging

# One thread sums in one order, and many small tensors are quicker without the others.
torch.set_num_threads(1)
logging.set_verbosity_error()
logging.disable_progress_bar()
