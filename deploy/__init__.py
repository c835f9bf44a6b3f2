"""From a compressed network to a file: packing, narrowing, training on the grid, sizes to be met."""
