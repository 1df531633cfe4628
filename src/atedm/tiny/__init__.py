"""A tiny SDXL of our own: the scenes it draws, how it was trained, and the judge of its pictures."""
