"""What can be known before a run starts: whether it fits, and whether what it needs is there."""
