"""Foreign checkpoints to wanjax parameters. The only package that knows other people's tensor names."""
