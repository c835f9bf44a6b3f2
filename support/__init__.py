"""What a run needs around the method: run directories, files, images, weights, any network's kernels."""
