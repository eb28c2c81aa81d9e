"""Does every kind of network export to ONNX, and does the file compute the same?
`python benchmarks/onnx_export.py PART --help` says what a part measures."""

from common import program
from parts import onnx_files, onnx_int8

PARTS = {"files": onnx_files, "int8": onnx_int8}

if __name__ == "__main__":
    program(__doc__, PARTS)
