"""The picture model: a small SDXL that draws rendered objects on backgrounds, its scenes and its training."""
