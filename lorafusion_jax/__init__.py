"""LoRAFusion in JAX: a frozen pool of LoRA modules, mixed for a new task by coefficients and magnitudes."""

__version__ = "0.1.0"
