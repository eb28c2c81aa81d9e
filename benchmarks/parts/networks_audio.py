"""Networks of torchaudio and of efficientnet_pytorch."""

from collections.abc import Callable
from typing import Any

from parts.networks import Inputs, Make, Network, images, tensors


def heard(build: Callable[[Any], Any], inputs: Inputs) -> Make:
    def make() -> Network:
        import torchaudio

        return Network(build(torchaudio.models), inputs)

    return make


def lengths(features: Inputs, frames: tuple[int, int]) -> Inputs:
    """Features and, of each sample, how many frames of it count."""

    def make(batch: int, another: bool) -> tuple[Any, ...]:
        import torch

        return (*features(batch, another), torch.tensor([frames[another]] * (batch - 1) + [frames[another] - 2]))

    return make


def torchaudio_networks() -> dict[str, Make]:
    wave, frames = tensors(((1, 800), (1, 960))), tensors(((24, 20), (30, 20)))
    encoder: dict[str, Any] = {
        "extractor_mode": "group_norm",
        "extractor_conv_layer_config": [(16, 10, 5), (16, 3, 2)],
        "extractor_conv_bias": False,
        "encoder_embed_dim": 24,
        "encoder_projection_dropout": 0.1,
        "encoder_pos_conv_kernel": 8,
        "encoder_pos_conv_groups": 4,
        "encoder_num_layers": 2,
        "encoder_num_heads": 4,
        "encoder_attention_dropout": 0.1,
        "encoder_ff_interm_features": 48,
        "encoder_ff_interm_dropout": 0.1,
        "encoder_dropout": 0.1,
        "encoder_layer_norm_first": False,
        "encoder_layer_drop": 0.0,
        "aux_num_out": 9,
    }
    separator = {"enc_num_feats": 16, "msk_num_feats": 16, "msk_num_hidden_feats": 24, "msk_num_layers": 2}
    return {
        "ConvTasNet": heard(lambda m: m.ConvTasNet(msk_num_stacks=1, **separator), wave),
        "DeepSpeech": heard(lambda m: m.DeepSpeech(20, n_hidden=24, n_class=9), tensors(((1, 24, 20), (1, 30, 20)))),
        "Wav2Letter": heard(lambda m: m.Wav2Letter(9, "mfcc", 13), tensors(((13, 60), (13, 80)))),
        "Conformer": heard(lambda m: m.Conformer(20, 4, 32, 2, 7, dropout=0.1), lengths(frames, (24, 30))),
        "wav2vec2_model": heard(lambda m: m.wav2vec2_model(**encoder), tensors(((800,), (960,)))),
        "WaveRNN": heard(
            lambda m: m.WaveRNN([2, 2], 9, 4, n_res_block=1, n_rnn=16, n_fc=16, n_freq=8, n_hidden=8, n_output=8),
            tensors(((1, 16), (1, 24)), ((1, 8, 8), (1, 8, 10))),
        ),
    }


def efficientnet_networks() -> dict[str, Make]:
    def make() -> Network:
        from efficientnet_pytorch import EfficientNet

        def use(pruned: Any) -> None:
            (image,) = images(64, 96)(1, False)
            assert pruned.extract_features(image).ndim == 4
            assert len(pruned.extract_endpoints(image)) > 4

        return Network(EfficientNet.from_name("efficientnet-b0", num_classes=7), images(64, 96), use)

    return {"efficientnet-b0": make}
