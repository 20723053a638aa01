"""The layer in torch's operators: rows sorted by expert, products, activations, the combine."""
