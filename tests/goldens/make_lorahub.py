"""Make `fusion/t5a/lorahub.npz` again: LoraHub's search over four adapters, with PEFT and nevergrad.

    python tests/goldens/make_lorahub.py      # with the extras `peft` and `lorahub`; a minute on one core

The search is that of LoraHub's published code: one weight for every adapter scales its A and its B in one PEFT adapter,
the objective is the mean cross-entropy of every batch, summed and divided by the number of rows, plus 0.05 mean |w|,
and nevergrad's NGOpt minimises it within +-1.5, from zeros.
"""

import tempfile
import warnings
from pathlib import Path

import make_fusion
import nevergrad
import numpy as np
import peft
import seeded
import torch

EVALUATIONS = 40
BOUND = 1.5
L1 = 0.05
SEED = 42


def objective(folder, names, arrays):
    """Return the function that LoraHub minimises."""
    model = peft.PeftModel.from_pretrained(
        make_fusion.load(folder), folder / "adapters" / names[0]
    ).eval()
    states = [
        peft.load_peft_weights(str(folder / "adapters" / name), device="cpu")
        for name in names
    ]
    texts = make_fusion.Texts(model, arrays)
    rows = sum(len(batch["labels"]) for batch in texts.batches)

    def score(weights):
        mixed = {
            key: sum(
                float(w) * state[key] for w, state in zip(weights, states, strict=True)
            )
            for key in states[0]
        }
        peft.set_peft_model_state_dict(model, mixed)
        with torch.no_grad():
            loss = sum(float(texts.run(k).loss) for k in (0, 1))
        return loss / rows + L1 * float(np.mean(np.abs(weights)))

    return score


def search(score, adapters, seed=SEED):
    """Return every weight that was tried with its score, and the recommendation."""
    tried = []
    scores = []

    def recorded(weights):
        tried.append(np.array(weights))
        scores.append(score(weights))
        return scores[-1]

    weights = nevergrad.p.Array(init=np.zeros(adapters), lower=-BOUND, upper=BOUND)
    optimiser = nevergrad.optimizers.NGOpt(parametrization=weights, budget=EVALUATIONS)
    optimiser.parametrization.random_state = np.random.RandomState(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = optimiser.minimize(recorded).value
    return {
        "eval_weights": np.stack(tried),
        "eval_scores": np.array(scores),
        "recommendation": np.array(found),
        "final_score": np.array(score(found)),
    }


def main():
    """Write the search over the pool of the first small T5."""
    out = seeded.target(seeded.HERE / "fusion" / "t5a")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = seeded.unfold(Path(temporary)) / "fusion" / "t5a"
        found = search(
            objective(folder, make_fusion.POOL, make_fusion.inputs("t5a")),
            len(make_fusion.POOL),
        )
    np.savez_compressed(out / "lorahub.npz", **found)


if __name__ == "__main__":
    main()
