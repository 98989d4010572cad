"""Public networks that metrics are made of, as JAX functions, and the converter of their published weights."""
