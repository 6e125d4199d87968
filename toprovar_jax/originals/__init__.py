"""Models from the files as they were released: which belong together, where they come from, what they become."""
