"""INT8 files: what becomes INT8, that it computes nearly the same, and how a variant is chosen."""

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from ekgfx.export import Samples, export_report, measure_latency, precisions_table, to_fp16, to_int8, to_onnx
from ekgfx.export import choosing, int8, processor
from ekgfx.export.choosing import onnx_call
from ekgfx.export.int8 import Quantizer, Recipe
from ekgfx.export.latency import LatencyTable, Speedup, Timing
from ekgfx.export.noise import Ratio
from ekgfx.export.precisions import faster_fp16
from torch import nn

from ekgfx.errors import ExportError

from .nets import Classifier, Windows
