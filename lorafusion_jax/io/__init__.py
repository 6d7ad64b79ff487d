"""Reading and writing: adapters of PEFT, models of Hugging Face, converted pools, trained numbers, states of runs."""
