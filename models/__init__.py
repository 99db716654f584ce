"""Mathematics: arrays in, arrays out; knows nothing of files, stores or flows."""
