"""Losses on token positions, in nats per token. These modules import with torch alone.

`objective.token_losses` is what the trainer calls; a further divergence is one function and one
entry, with its laws, in `divergences.DIVERGENCES`.
"""
