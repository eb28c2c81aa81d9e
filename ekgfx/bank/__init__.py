"""The memory bank: what the interim sub-networks say about every training image (eq. 10), kept in half precision.

A bank is a folder with one file of fixed-size rows per teacher (row = training sample) and `bank.json`, which holds
shapes, teachers and checksums. The files are memory-mapped: reading needs no more memory than the samples asked for.
"""

from ekgfx.bank.build import Progress, build_bank
from ekgfx.bank.store import Bank, ResidentBank
from ekgfx.bank.teachers import STATISTICS, pick_teachers

__all__ = ["STATISTICS", "Bank", "Progress", "ResidentBank", "build_bank", "pick_teachers"]
