"""What the figures are held against, and the processes that are measured."""
