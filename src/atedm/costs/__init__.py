"""What a denoising step costs, dense and pruned: arithmetic, memory and time, for any U-Net."""
