"""Fuse three adapters for a new task, step by step: python examples/fuse_in_python.py

`lorafusion fuse` and `lorafusion_jax.fuse` do all of this in one call. Here are the parts below them, which are plain
functions of arrays: use them to put a fusion into a training loop of your own.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import lorafusion_jax as lf
from lorafusion_jax import tasks

SMALL = Path(__file__).parent / "small"


def main(epochs: int = 10, test_rows: int = 200) -> float:
    # A frozen base, and a frozen pool of PEFT adapters. The task joins operations that single adapters were trained on.
    model = lf.load_base(SMALL / "base")
    adapters = [
        str(SMALL / "adapters" / name)
        for name in ("pairswap_dash", "pairswap_digit", "sort_numvow")
    ]
    pool = lf.read_pool(adapters, model.config)
    task = tasks.load_task(SMALL / "tasks" / "pairswap_numvow")
    tokenizer = lf.load_tokenizer(SMALL / "base")
    padding = model.config.pad_id
    train = tasks.encode(tokenizer, task.train[:95])

    # The numbers to train: one coefficient per module and block, and one magnitude per column of a matrix.
    fusion = lf.Fusion(composition="sum", granularity="block")
    problem = lf.problem(model, pool, fusion)
    state = lf.init_state(problem, jax.random.key(1))

    # A step is a pure function: (state, batch) -> (state, metrics). The problem's weights are arguments.
    step = jax.jit(lf.fusion_step, static_argnames="optimisation")
    orders = tasks.batch_orders(
        np.arange(len(train), dtype=np.int32)[None],
        batch_size=10,
        epochs=epochs,
        seeds=(1,),
    )
    optimisation = lf.Optimisation(steps=orders.shape[1], schedule="cosine", clip=1.0)
    rates = {"coefficients": jnp.array(0.1), "magnitudes": jnp.array(0.01)}
    metrics = {}
    for batch in tasks.train_batches(train, orders, pad_id=padding):
        batch = jax.tree.map(lambda rows: jnp.asarray(rows[0]), batch)  # the only seed
        state, metrics = step(state, batch, problem, rates, optimisation=optimisation)
    print(f"loss of the last batch: {metrics['loss']:.3f}")

    # The trained parameters give one adapter per matrix, which the model reads next to its kernels.
    fused, _ = fusion.adapters(state.params, problem.frozen, problem.index)
    test = task.test[:test_rows]
    encoded = tasks.encode(tokenizer, test)
    ids = jnp.asarray(tasks.pad(encoded.inputs, padding, max(map(len, encoded.inputs))))
    tokens = lf.generate(model, ids, ids != padding, fused, max_new_tokens=24)
    answers = tokenizer.batch_decode(np.asarray(tokens), skip_special_tokens=True)
    right = sum(answer == row.target for answer, row in zip(answers, test, strict=True))
    print(f"{right} of {len(test)} test rows are right")
    return right / len(test)


if __name__ == "__main__":
    main()
