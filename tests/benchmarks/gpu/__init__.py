"""One prepared run on a GPU: see `__main__`."""
