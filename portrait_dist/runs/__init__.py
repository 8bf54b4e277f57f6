"""What a run left in its folder: status and report."""
