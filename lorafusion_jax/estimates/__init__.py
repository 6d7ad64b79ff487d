"""What a run needs, without weights: parameters, FLOPs, memory, energy, plans."""

from .energy import (
    CostOptions as CostOptions,
    TaskCost as TaskCost,
    digital_macs as digital_macs,
    energy_table as energy_table,
    number as number,
    quantity as quantity,
    task_costs as task_costs,
)
from .estimate import (
    Settings as Settings,
    held_bytes as held_bytes,
    program_of as program_of,
    trained_numbers as trained_numbers,
)
from .machines import (
    PlanOptions as PlanOptions,
    machine as machine,
    pace as pace,
    spent as spent,
)
from .params import shape_config as shape_config
from .plan import (
    describe as describe,
    describe_run as describe_run,
    plan as plan,
    pool_shape as pool_shape,
    workloads as workloads,
)
from .workload import (
    CHARACTERS_PER_TOKEN as CHARACTERS_PER_TOKEN,
    Shape as Shape,
    workload as workload,
)
