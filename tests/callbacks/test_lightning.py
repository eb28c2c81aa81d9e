"""Lightning's callback: a network is cut in the middle of a real training, and taught afterwards."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("pytorch_lightning", reason="Lightning is not installed")
import pytorch_lightning as lightning

import ekgfx
from ekgfx.callbacks.lightning import PruneAndTeach
from ekgfx.data.batches import Inputs
from ekgfx.errors import RecipeError
from ekgfx.models import digits_cnn
from ekgfx.training.evaluation import evaluate
from ekgfx.training.loss import softened_kl


class Classifier(lightning.LightningModule):
    """As people write it: its loss in training_step, the loader without indices."""

    def __init__(self) -> None:
        super().__init__()
        self.net = digits_cnn()
        self.losses: list[float] = []

    def training_step(self, batch, _):
        images, labels = batch
        loss = F.cross_entropy(self.net(images), labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


@pytest.fixture(scope="module")
def digits():
    data = ekgfx.data.load("digits")
    batch = next(iter(data.loader("train", data.size("train"))))
    return torch.utils.data.TensorDataset(batch.images, batch.labels), data.loader("test", 256)


def quiet_trainer(*callbacks, **limits):
    return lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=list(callbacks),
        **limits,
    )


def fitted(callback, loader, epochs):
    torch.manual_seed(0)
    module = Classifier()
    trainer = quiet_trainer(callback, max_epochs=epochs)
    trainer.fit(module, loader)
    return module, trainer


def test_a_network_is_cut_and_taught_while_it_trains(digits):
    dataset, test = digits
    loader = torch.utils.data.DataLoader(dataset, batch_size=64, shuffle=True)
    callback = PruneAndTeach(flops=0.5, epoch=3, count=4, strategy="uniform", importance="magnitude")
    module, trainer = fitted(callback, loader, 5)
    plan = callback.midway.plan
    assert plan is not None
    traced = ekgfx.trace(digits_cnn(), torch.zeros(2, 1, 8, 8))
    assert sum(p.numel() for p in module.net.parameters()) == traced.cost(plan).params < traced.cost().params
    assert type(module.net) is type(digits_cnn())
    (optimizer,) = trainer.optimizers
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in module.parameters()}
    assert all(state["momentum_buffer"].shape == p.shape for p, state in optimizer.state.items())
    accuracy = evaluate(module.net.eval(), test).accuracy
    assert accuracy is not None and accuracy > 0.9
    assert "training_step" not in module.__dict__ and not module.net._forward_hooks


def test_the_loss_that_is_trained_on_holds_the_guidance(digits):
    """Checked against KL_T(unpruned ‖ pruned) computed by hand, on the batch that training_step was given."""
    dataset, _ = digits
    loader = torch.utils.data.DataLoader(dataset, batch_size=64, shuffle=True)
    callback = PruneAndTeach(flops=0.5, count=2, strategy="uniform", importance="magnitude", refit=False)
    returned = []

    class Told(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, number):
            returned.append((float(outputs["loss"]), module.losses[-1]))

    torch.manual_seed(0)
    module = Classifier()
    trainer = quiet_trainer(callback, Told(), max_steps=3)
    trainer.fit(module, loader)
    assert len(returned) == 3 and all(with_guidance > alone for with_guidance, alone in returned)
    images = dataset[:16][0]
    module.eval()
    with torch.no_grad():
        student, teacher = module.net(images), callback.midway.teacher(images)
    expected = softened_kl(teacher, student, 4.0).mean()
    torch.testing.assert_close(callback.midway.guidance(Inputs.of(images), student), expected)


def test_what_is_not_clear_is_asked_for(digits):
    dataset, _ = digits
    loader = torch.utils.data.DataLoader(dataset, batch_size=64)

    class Two(Classifier):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(1, 1)

    trainer = quiet_trainer(PruneAndTeach(0.5), max_steps=1)
    with pytest.raises(RecipeError, match=r"not clear \(net, other\); pass network='NAME'"):
        trainer.fit(Two(), loader)
