"""`python -m helix_jax` is `helix-jax`."""

import sys

from helix_jax.cli import main

sys.exit(main())
