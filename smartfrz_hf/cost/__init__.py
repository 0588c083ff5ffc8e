"""What a run costs, and what freezing saves."""
