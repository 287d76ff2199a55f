"""Optax gradient transformations that train transformers with low-rank optimizer state."""

from sumo_optax import presets as presets
from sumo_optax._conventions import flax_dimension_numbers as flax_dimension_numbers
from sumo_optax._convert import check_state as check_state
from sumo_optax._convert import convert_state as convert_state
from sumo_optax._gradient import ProjectedGradient as ProjectedGradient
from sumo_optax._in_subspace import SubspaceState as SubspaceState
from sumo_optax._in_subspace import scale_in_subspace as scale_in_subspace
from sumo_optax._last_norm import LastNormState as LastNormState
from sumo_optax._last_norm import clip_by_last_norm as clip_by_last_norm
from sumo_optax._linalg import polar_factor as polar_factor
from sumo_optax._measured import MeasuredState as MeasuredState
from sumo_optax._metrics import SubspaceMetrics as SubspaceMetrics
from sumo_optax._metrics import subspace_metrics as subspace_metrics
from sumo_optax._mofasgd import MofasgdState as MofasgdState
from sumo_optax._mofasgd import mofasgd as mofasgd
from sumo_optax._mofasgd import scale_by_mofasgd as scale_by_mofasgd
from sumo_optax._online_subspace_descent import online_subspace_descent as online_subspace_descent
from sumo_optax._online_subspace_descent import (
    scale_by_online_subspace_descent as scale_by_online_subspace_descent,
)
from sumo_optax._quantize import QuantizedState as QuantizedState
from sumo_optax._quantize import quantize_state as quantize_state
from sumo_optax._report import describe as describe
from sumo_optax._report import state_bytes as state_bytes
from sumo_optax._sharding import abstract_state as abstract_state
from sumo_optax._sharding import state_shardings as state_shardings
from sumo_optax._subspace_gradients import subspace_value_and_grad as subspace_value_and_grad
from sumo_optax._sumo import SumoState as SumoState
from sumo_optax._sumo import scale_by_sumo as scale_by_sumo
from sumo_optax._sumo import sumo as sumo
from sumo_optax._value_and_update import value_and_update as value_and_update
from sumo_optax._version import __version__ as __version__
