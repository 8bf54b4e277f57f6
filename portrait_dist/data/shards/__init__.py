"""WebDataset shards: format, codecs, writer, reader, cache of remote shards, verification."""
