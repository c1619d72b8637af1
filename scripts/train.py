#!/usr/bin/env python3
"""Runs `helix-jax train` with the same options."""

import sys

from helix_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
