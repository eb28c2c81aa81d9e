"""Prune any PyTorch model to a budget, keep its accuracy, prove the speed-up."""
