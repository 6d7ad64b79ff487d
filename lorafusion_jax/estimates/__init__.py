"""What a run needs, without weights: parameters, FLOPs, memory, energy, plans."""

from .energy import CostOptions as CostOptions
from .energy import TaskCost as TaskCost
from .energy import energy_table as energy_table
from .energy import number as number
from .energy import quantity as quantity
from .energy import task_costs as task_costs
from .estimate import Settings as Settings
from .estimate import held_bytes as held_bytes
from .estimate import program_of as program_of
from .estimate import trained_numbers as trained_numbers
from .machines import PlanOptions as PlanOptions
from .machines import machine as machine
from .machines import pace as pace
from .machines import spent as spent
from .params import shape_config as shape_config
from .plan import describe as describe
from .plan import describe_run as describe_run
from .plan import plan as plan
from .plan import pool_shape as pool_shape
from .plan import workloads as workloads
from .workload import CHARACTERS_PER_TOKEN as CHARACTERS_PER_TOKEN
from .workload import Shape as Shape
from .workload import workload as workload
