"""What a run needs, without weights: parameters, FLOPs, memory, energy, plans."""

from .bill import Bill as Bill
from .bill import CostOptions as CostOptions
from .bill import activities as activities
from .bill import bills as bills
from .bill import comparisons as comparisons
from .bill import installed_once as installed_once
from .bill import price as price
from .bill import price_once as price_once
from .bill.show import number as number
from .bill.show import quantity as quantity
from .estimate import Settings as Settings
from .estimate import held_bytes as held_bytes
from .estimate import program_of as program_of
from .estimate import trained_numbers as trained_numbers
from .machines import PlanOptions as PlanOptions
from .machines import machine as machine
from .params import shape_config as shape_config
from .plan import describe as describe
from .plan import describe_run as describe_run
from .plan import plan as plan
from .workload import CHARACTERS_PER_TOKEN as CHARACTERS_PER_TOKEN
from .workload import Shape as Shape
from .workload import workload as workload
