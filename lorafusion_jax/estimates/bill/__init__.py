"""The cost of one new task for every method, on arrays and in digital logic, from shapes alone."""

# ruff: noqa: F401 (the imports are the public names)

from .activity import Activity, activities, installed_once
from .bill import Bill, Once, bills, price, price_once
from .comparison import Comparison, comparisons
from .options import CostOptions
