"""The Trainer's callback: a small ViT is cut in the middle of a real training, and taught afterwards."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate, which the Trainer needs, is not installed")
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import ekgfx
from ekgfx.callbacks.transformers import PruneAndTeach


class Digits(torch.utils.data.Dataset):
    """Scikit-learn's digits as the Trainer takes them."""

    def __init__(self):
        data = ekgfx.data.load("digits")
        batch = next(iter(data.loader("train", 512)))
        self.images, self.labels = batch.images, batch.labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, number):
        return {"pixel_values": self.images[number], "labels": self.labels[number]}


def test_a_model_is_cut_and_taught_while_it_trains(tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=10,
        initializer_range=0.15,
    )
    model, dataset = ViTForImageClassification(config), Digits()
    parameters = sum(p.numel() for p in model.parameters())
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=5,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        report_to=[],
        save_strategy="no",
        logging_steps=20,
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    callback = PruneAndTeach(flops=0.7, after=0.5, count=2, strategy="uniform", importance="magnitude")
    trainer = Trainer(model, arguments, train_dataset=dataset, callbacks=[callback])
    trainer.train()
    assert callback.midway.plan is not None and trainer.model is model
    assert sum(p.numel() for p in model.parameters()) < parameters
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] and len(losses) == 8
    images = dataset.images[:64]
    with torch.no_grad():
        model.eval()
        right = (model(pixel_values=images).logits.argmax(1) == dataset.labels[:64]).float().mean()
    assert right > 0.5
    assert not model._forward_hooks
