"""Reading and writing: adapters of PEFT, models of Hugging Face, converted pools, checkpoints."""
