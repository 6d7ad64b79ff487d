"""The bill of one new task for every method, on arrays and in digital logic, from shapes alone."""

from .activity import Activity, activities, installed_once
from .bill import Bill, Once, bills, price, price_once
from .comparison import Comparison, comparisons
from .options import CostOptions

__all__ = [
    "Activity",
    "Bill",
    "Comparison",
    "CostOptions",
    "Once",
    "activities",
    "bills",
    "comparisons",
    "installed_once",
    "price",
    "price_once",
]
