"""Training objectives: tensors in, losses out. Nothing here knows a model, a rank or a batch layout."""
