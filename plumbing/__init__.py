"""What a reader of a method never needs: flags, run folders, reports, models, several processes."""
