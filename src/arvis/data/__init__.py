"""Data sets: the emoji world, scenes composed from it, folders, parquet and tar files of pictures."""
