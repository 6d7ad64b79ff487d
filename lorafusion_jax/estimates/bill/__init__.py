"""The bill of one new task for every method, on arrays and in digital logic, from shapes alone."""

from .activity import Activity, activities, installed_once
from .bill import Bill, bills, price
from .comparison import Comparison, comparisons
from .options import CostOptions

__all__ = [
    "Activity",
    "Bill",
    "Comparison",
    "CostOptions",
    "activities",
    "bills",
    "comparisons",
    "installed_once",
    "price",
]
