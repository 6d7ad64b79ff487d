"""What a matrix would run and need, printed without running or loading weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from _matrix import EPOCHS, TRAIN_ROWS, MatrixOptions, jobs
from _methods import Entry

from lorafusion_jax import PRESETS, read_config
from lorafusion_jax.io.pool import read_manifest
from lorafusion_jax.params import SHAPES
from lorafusion_jax.tasks import load_task, load_tokenizer
from lorafusion_jax.train.estimate import Settings
from lorafusion_jax.train.plan import print_plan
from lorafusion_jax.train.setup import available
from lorafusion_jax.train.sweep import default_path
from lorafusion_jax.train.workload import workload
