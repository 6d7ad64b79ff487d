"""`python -m lorafusion_jax.cli`."""

from . import main

if __name__ == "__main__":
    main()
