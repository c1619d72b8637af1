"""Transformers in Flax NNX, written globally: attention comes in as an argument."""
