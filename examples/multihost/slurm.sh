#!/bin/bash
# sbatch examples/multihost/slurm.sh: 4 nodes of 8 GPUs, one process a node. JAX finds the rest.
#SBATCH --job-name=pretrain
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue

srun .venv/bin/python examples/pretrain.py --preset 1b --scan-layers --rank 512 \
  --data hf:allenai/c4 --tokenizer bpe:32000 \
  --mesh data=1,fsdp=8,tensor=4 --out "$SCRATCH/pretrain-1b"
