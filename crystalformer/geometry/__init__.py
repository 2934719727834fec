"""What is summed over: the images and wave vectors of a geometry, how far they reach, and how far atoms may move."""
