"""Speed of kernels, of the passes that compile, and of whole models."""
