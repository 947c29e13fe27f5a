"""Files to token rows: documents, filters, duplicates, packing. No tensors: arrays of numpy."""
