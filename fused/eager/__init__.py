"""The operations in closed form in plain PyTorch: the CPU path, and any device without Triton."""
