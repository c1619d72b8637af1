#!/usr/bin/env bash
# Runs a command of helix_jax on several hosts under Slurm, with one process per GPU, as JAX expects it there.
#
#   sbatch --nodes 2 scripts/slurm.sh helix-jax generate --model DIR --prompt-file book.txt --tp 8 --cp 2
#   sbatch --nodes 2 scripts/slurm.sh helix-jax train --config my.toml --dp 2 --cp 8 --out runs/mine
#
# Activate the environment that contains helix_jax before. DIR, files and --out must be on storage that all hosts see. The
# first process prints and writes. If a process is lost, the others end within a minute and srun ends the job. The same
# command then continues: a batch after its last result, training after its last checkpoint.
#SBATCH --job-name helix
#SBATCH --ntasks-per-node 8
#SBATCH --gpus-per-node 8
#SBATCH --exclusive
set -euo pipefail
exec srun --kill-on-bad-exit=1 "$@" --distributed
