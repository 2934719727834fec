"""What every layer uses: checks of arguments, backends, files, words, the process, ragged tensors. No crystals."""
