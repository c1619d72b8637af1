"""Runs the command `helix-jax` as `python -m helix_jax`."""

import sys

from helix_jax.cli import main

sys.exit(main())
