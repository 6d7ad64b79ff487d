"""Reading and writing: PEFT adapters, models of Hugging Face, converted pools, trained parameters, states of runs."""
