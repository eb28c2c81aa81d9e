"""ONNX files of pruned networks, the proof that they compute the same, and what they save in time.

from ekgfx.export import to_onnx, check_parity, measure_latency
"""

from .breakdown import Breakdown, LayerTime, break_down
from .choosing import Int8, to_int8
from .exporter import to_fp16, to_onnx
from .latency import LatencyTable, Speedup, Timing, measure_latency
from .noise import Ratio, compare
from .parity import Difference, Parity, amplification, check_parity
from .precisions import Precisions, Samples, Variant
from .providers import PROVIDERS, Presence, Provider, providers
from .report import ExportReport, export_report
from .tables import latency_table, parity_text, precisions_table

__all__ = [
    "PROVIDERS",
    "Breakdown",
    "Difference",
    "ExportReport",
    "Int8",
    "LatencyTable",
    "LayerTime",
    "Parity",
    "Precisions",
    "Presence",
    "Provider",
    "Ratio",
    "Samples",
    "Speedup",
    "Timing",
    "Variant",
    "amplification",
    "break_down",
    "check_parity",
    "compare",
    "export_report",
    "latency_table",
    "measure_latency",
    "parity_text",
    "precisions_table",
    "providers",
    "to_fp16",
    "to_int8",
    "to_onnx",
]
