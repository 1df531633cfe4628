"""Scores of images: distance to dense, LPIPS, caption accuracy, CLIP score, FID, and their intervals."""
