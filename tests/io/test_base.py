"""A base that is opened once: what is read of it, and how often."""

from collections import Counter
from functools import partial

import one_block

import lorafusion_jax as lf
from lorafusion_jax.io import base_files, open_base


def _counted(counts, name, function, *args, **how):
    counts[name] += 1
    return function(*args, **how)


def test_a_fusion_opens_its_base_once_and_reads_its_weights_once(
    small, monkeypatch, tmp_path
):
    opened = Counter()
    for name in ("_open", "read_json"):
        counted = partial(_counted, opened, name, getattr(base_files, name))
        monkeypatch.setattr(base_files, name, counted)
    task = one_block.SMALL / "tasks" / "double_digit"
    recipe = lf.FusionRecipe(modules=2, epochs=1, batch_size=48, max_new_tokens=4)
    lf.fuse(
        lf.FuseOptions(
            base=str(small[0]),
            pool=str(small[1]),
            task=str(task),
            recipe=recipe,
            test_rows=2,
            out=tmp_path,
        )
    )
    assert opened["_open"] == 1
    assert (
        opened["read_json"] <= 4
    )  # config.json, generation_config.json, tokenizer_config.json and no second one


def test_weights_are_hashed_while_they_are_loaded(small):
    base = open_base(small[0])
    assert open_base(base) is base
    base.load(hashed=True)
    assert vars(base)["digest"] == open_base(small[0]).digest
