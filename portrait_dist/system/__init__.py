"""The machine: what it has, memory allocator, diagnosis, progress."""
