"""Convert LoRA adapters of PEFT into a pool: python convert_peft_weights.py --help."""

import sys

from lorafusion_jax.cli import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
