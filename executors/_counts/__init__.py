"""What a layer's kernels ask of a GPU's units, counted while their PTX is executed on a CPU, and a card's rates."""
