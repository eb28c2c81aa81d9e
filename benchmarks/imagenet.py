"""ResNet-50 on a few ImageNet images, and what ImageNet itself would take. `python benchmarks/imagenet.py PART --help`
says what a part measures."""

from common import program
from parts import imagenet_hours, imagenet_int8, imagenet_latency, imagenet_sample

PARTS = {"sample": imagenet_sample, "latency": imagenet_latency, "int8": imagenet_int8, "hours": imagenet_hours}

if __name__ == "__main__":
    program(__doc__, PARTS)
