"""Portrait background removal at any scale."""
