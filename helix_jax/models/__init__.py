"""Transformers in Flax NNX, written without a mesh or a cache: attention and the run of experts are arguments."""
