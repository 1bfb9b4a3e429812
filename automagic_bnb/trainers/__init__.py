"""What takes the optimizer into trainers that have a list of their own: the runner's replacing, plugins, entries."""
