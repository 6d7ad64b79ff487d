"""What do imprecise cells do to a Flax model, and does preparing it help? python examples/crossbar_on_your_model.py

The model here is a small classifier that is trained on the spot; put your own in its place. `prepare` and `convert`
take any NNX model, whose code stays as it is.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lorafusion_jax import crossbar
from lorafusion_jax.crossbar import flax as crossbar_flax


class Classifier(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(32, 64, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.hidden(x)))


def trained(x, labels, steps: int) -> Classifier:
    model = Classifier(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()

    for _ in range(steps):
        optimizer.update(model, nnx.jit(nnx.grad(loss))(model))
    return model


def main(bits: tuple[int, ...] = (8, 4), steps: int = 100) -> dict[str, float]:
    # Ten classes, scattered about ten random centres, in units that differ from input to input.
    noise, classes, centres, units = jax.random.split(jax.random.key(0), 4)
    labels = jax.random.randint(classes, (2_000,), 0, 10)
    x = 0.6 * jax.random.normal(centres, (10, 32))[labels] + jax.random.normal(
        noise, (2_000, 32)
    )
    x = x * jnp.exp(jax.random.normal(units, (1, 32)))
    train = slice(0, 1_000)
    test = slice(1_000, 2_000)
    model = trained(x[train], labels[train], steps)

    models = {"digital": model}
    for count in bits:
        # 2-bit cells with 10 % programming error. `"head": None` as the first rule would keep the last layer digital.
        cells = crossbar.Device(programming=crossbar.Independent(0.1))
        plain = crossbar.CrossbarConfig(
            mapping=crossbar.Mapping(scale="column"),
            adc=crossbar.ADC(bits=count),
            device=cells,
        )
        changed = dataclasses.replace(
            plain.mapping, factors=True, transform="hadamard", clip="optimal"
        )
        for name, config in (
            ("", plain),
            (", prepared", dataclasses.replace(plain, mapping=changed)),
        ):
            rules = {"*": config}
            few = [x[train][:64]]
            # The inputs show what matters; no label and no chip is needed, so one preparation serves all chips.
            preparations = crossbar_flax.prepare(model, rules, few)
            on_arrays = crossbar_flax.convert(
                model, rules, jax.random.key(1), preparations
            )
            models[f"{count}-bit ADC{name}"] = crossbar_flax.calibrate(on_arrays, few)
    accuracy = {
        name: float(jnp.mean(each(x[test]).argmax(axis=1) == labels[test]))
        for name, each in models.items()
    }
    for name, share in accuracy.items():
        print(f"{name:19} {share:6.1%} of the test rows are right")
    for row in crossbar_flax.site_errors(models[f"{bits[-1]}-bit ADC"], [x[test][:64]]):
        print(
            f"{row['site']:10} {row['sqnr']:.1f} dB of signal to error, {row['clipped']:.2%} clipped"
        )
    return accuracy


if __name__ == "__main__":
    main()
