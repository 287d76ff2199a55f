"""MaxText's `train` with SUMO: `python maxtext_with_sumo.py base.yml key=value ...`."""

import sys

from maxtext.optimizers import optimizers
from maxtext.trainers.pre_train import train

import sumo_optax


def get_optimizer(config, learning_rate_schedule, model=None, mesh=None):
    return sumo_optax.sumo(learning_rate_schedule, rank=8)


optimizers.get_optimizer = get_optimizer  # what `train` asks for its optimizer

if __name__ == "__main__":
    train.main(sys.argv)
