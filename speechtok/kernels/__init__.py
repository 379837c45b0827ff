"""Hot loops as torch custom operators ``torch.ops.speechtok.*``: numba on CPU, Triton on CUDA, a reference each."""
