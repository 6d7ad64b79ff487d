"""Reading and writing: adapters, models of Hugging Face, converted pools, trained parameters, states of runs."""
