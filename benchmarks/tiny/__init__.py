"""Training of the bundled tiny model: procedural clips, its VAE, its tokenizer and its diffusion transformer."""
