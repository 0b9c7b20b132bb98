"""Every causal family of transformers, tiny and random, through the product."""
