"""Which layers may share an indexer's choice: overlap, pattern search, distillation, conversion."""
