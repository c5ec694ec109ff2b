"""The byte beam: states as arrays, kernels that step all lanes, and the view of one text."""
