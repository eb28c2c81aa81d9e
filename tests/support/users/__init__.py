"""Models as users bring them, small: each with the channel groups that were derived by hand."""
