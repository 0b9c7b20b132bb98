"""Losses on token positions, in nats per token. These modules import with torch alone.

`token_losses.token_losses` evaluates terms, `auxiliary.auxiliary` adds what reads other outputs of
the decoder, `registry` links both to the kinds of the config. A further divergence is one function
and one entry, with its laws, in `terms.divergences.DIVERGENCES`.
"""
