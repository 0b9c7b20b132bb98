"""Do the methods work on real text? Cells of one table, each a config of the product."""
