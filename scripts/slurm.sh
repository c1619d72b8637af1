#!/usr/bin/env bash
# Runs a command of helix_jax on several hosts under Slurm: one process for each GPU, as JAX expects it there.
#
#   sbatch --nodes 2 scripts/slurm.sh helix-jax generate --model DIR --prompt-file book.txt --tp 8 --cp 2
#   sbatch --nodes 2 scripts/slurm.sh python scripts/train.py --config my.toml --dp 2 --cp 8 --out runs/mine
#
# The environment that has helix_jax is to be active; DIR, files and --out lie where all hosts see them. The first
# process prints and writes. A process that is lost ends the others within a minute: srun then ends the job, and the
# same command goes on, a batch after its last result, training after its last state.
#SBATCH --job-name helix
#SBATCH --ntasks-per-node 8
#SBATCH --gpus-per-node 8
#SBATCH --exclusive
set -euo pipefail
exec srun --kill-on-bad-exit=1 "$@" --distributed
