"""Raw trees, their pairs and split, and generated portraits."""
