"""The rows that seeds train and validate on, as tokens."""

from collections.abc import Iterator
from typing import NamedTuple

from ..tasks import Batch, Encoded, Split, batch_orders, train_batches


class TrainingRows(NamedTuple):
    """Rows of a task, and those that each seed uses.

    Attributes:
      tokens: tokens of all rows.
      split: training and validation rows of each seed.
      pad_id: token that fills up a batch.
    """

    tokens: Encoded
    split: Split
    pad_id: int

    def once(self, batch_size: int) -> Iterator[Batch]:
        """Yield batches that hold every training row of every seed once; leaves have a leading axis of seeds."""
        return train_batches(self.tokens, batch_orders(self.split.train, batch_size=batch_size), pad_id=self.pad_id)
