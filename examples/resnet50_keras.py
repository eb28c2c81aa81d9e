"""ResNet-50 with the ImageNet weights of the Keras application, as a MODEL for ekgfx.

    ekgfx eval examples/resnet50_keras.py:resnet50 --weights resnet50-imagenet-keras-fp16.safetensors \
        --data folder:imagenet-sample

The network is timm's `resnet50`, except that the first block of a stage has its stride on conv1, and that images are
normalized with Caffe's mean. Instead of `--weights`, the environment variable EKGFX_DATA may name the folder that has
the file as weights/resnet50-imagenet-keras-fp16.safetensors; without either the weights are random.
"""

import os
from pathlib import Path

import timm
from torch import nn

from ekgfx.models.weights import load_weights


def resnet50() -> nn.Module:
    model = timm.create_model("resnet50")
    for stage in (model.layer2, model.layer3, model.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    model.pretrained_cfg = {
        "input_size": (3, 224, 224),
        "num_classes": 1000,
        "mean": (123.68 / 255, 116.779 / 255, 103.939 / 255),
        "std": (0.229, 0.224, 0.225),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
    }
    folder = os.environ.get("EKGFX_DATA")
    if folder:
        load_weights(model, Path(folder) / "weights" / "resnet50-imagenet-keras-fp16.safetensors")
    return model
