"""Convert LoRA adapters of PEFT into a pool: python convert_peft_weights.py --help."""

import sys

import tyro

from lorafusion_jax.io.convert import ConvertOptions, convert

_DESCRIPTION = """Convert LoRA adapters of PEFT into a pool, ready to be fused.

Example:
  python convert_peft_weights.py --base google/flan-t5-large --out pools/two \\
    --adapters lorahub/flan_t5_large-duorc_ParaphraseRC_title_generation lorahub/flan_t5_large-super_glue_wic
"""

if __name__ == "__main__":
    options = tyro.cli(ConvertOptions, description=_DESCRIPTION)
    try:
        convert(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
