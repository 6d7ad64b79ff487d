"""Base models in llama.cpp's GGUF files."""
