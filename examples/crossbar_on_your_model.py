"""What does an ADC of a few bits do to a Flax model? python examples/crossbar_on_your_model.py

The model here is a small classifier that is trained on the spot; put your own in its place. `convert` takes any NNX
model, whose code stays as it is.
"""

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


def main(bits: tuple[int, ...] = (8, 4, 3, 2), steps: int = 100) -> dict[str, float]:
    # Ten classes, scattered about ten random centres.
    noise, classes, centres = jax.random.split(jax.random.key(0), 3)
    labels = jax.random.randint(classes, (2_000,), 0, 10)
    x = 0.6 * jax.random.normal(centres, (10, 32))[labels] + jax.random.normal(noise, (2_000, 32))
    train, test = slice(0, 1_000), slice(1_000, 2_000)
    model = trained(x[train], labels[train], steps)

    models = {"digital": model}
    for count in bits:
        # 2-bit cells with 3 % programming error. `"head": None` as the first rule would keep the last layer digital.
        cells = crossbar.Device(programming=crossbar.Independent(0.03))
        config = crossbar.CrossbarConfig(adc=crossbar.ADC(bits=count), device=cells)
        on_arrays = crossbar_flax.convert(model, {"*": config}, jax.random.key(1))
        models[f"{count}-bit ADC"] = crossbar_flax.calibrate(on_arrays, [x[train][:64]])
    accuracy = {name: float(jnp.mean(each(x[test]).argmax(axis=1) == labels[test])) for name, each in models.items()}
    for name, share in accuracy.items():
        print(f"{name:10} {share:6.1%} of the test rows are right")
    for row in crossbar_flax.site_errors(models[f"{bits[-1]}-bit ADC"], [x[test][:64]]):
        print(f"{row['site']:10} {row['sqnr']:.1f} dB of signal to error, {row['clipped']:.2%} clipped")
    return accuracy


if __name__ == "__main__":
    main()
