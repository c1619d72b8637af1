#!/usr/bin/env python3
"""Runs `helix-jax eval needles` with the same options."""

import sys

from helix_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", "needles", *sys.argv[1:]]))
