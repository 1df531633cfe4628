"""Sheets of images: a comparison with the dense image, and maps of what was kept."""
