#!/usr/bin/env python3
"""Runs `helix-jax eval perplexity` with the same options."""

import sys

from helix_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", "perplexity", *sys.argv[1:]]))
