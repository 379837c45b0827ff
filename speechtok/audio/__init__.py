"""Sound files, resampling and batched front ends."""
