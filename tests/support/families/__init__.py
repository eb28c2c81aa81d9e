"""Families of architectures, each in a small network whose channel groups were derived by hand."""
