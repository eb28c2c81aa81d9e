"""What timm's train.py does to a model, its data and its loss, in the order and with the arguments of that script as
read in timm 0.8 and 1.0 (it is no part of timm's package). Its options are some of the script's own, so that the one
can stand in for the other.
"""

import argparse
from pathlib import Path

import torch
from timm import utils
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

parser = argparse.ArgumentParser()
parser.add_argument("--data-dir")
parser.add_argument("--model")
parser.add_argument("--pretrained", action="store_true")
parser.add_argument("--batch-size", type=int)
parser.add_argument("--epochs", type=int)
parser.add_argument("--lr", type=float)
parser.add_argument("--warmup-epochs", type=int)
parser.add_argument("--workers", type=int)
parser.add_argument("--device")
parser.add_argument("--output")
parser.add_argument("--experiment")
parser.add_argument("--smoothing", type=float, default=0.1)
parser.add_argument("--no-prefetcher", action="store_true")
parser.add_argument("--model-ema", action="store_true")


def make_loss(model: torch.nn.Module, args: argparse.Namespace):
    """Older scripts name the loss; newer ones have a task that holds the model make it."""
    try:
        from timm.task import ClassificationTask

        task = ClassificationTask(
            model, criterion_kwargs={"smoothing": args.smoothing}, device=torch.device(args.device)
        )
    except (ImportError, TypeError):
        loss = LabelSmoothingCrossEntropy(smoothing=args.smoothing).to(device=args.device)
        return lambda images, target: loss(model(images), target)
    return lambda images, target: task(images, target)["loss"]


def main() -> None:
    args = parser.parse_args()
    utils.random_seed(42, 0)
    model = create_model(
        args.model,
        pretrained=args.pretrained,
        in_chans=3,
        num_classes=None,
        drop_rate=0.0,
        drop_path_rate=None,
        drop_block_rate=None,
        global_pool=None,
        bn_momentum=None,
        bn_eps=None,
        scriptable=False,
        checkpoint_path="",
    )
    config = resolve_data_config(vars(args), model=model)
    model.to(device=args.device)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=args.lr, weight_decay=2e-5, momentum=0.9)
    ema = utils.ModelEmaV2(model, decay=0.9) if args.model_ema else None
    common = {"root": args.data_dir, "class_map": "", "download": False, "batch_size": args.batch_size}
    train = create_dataset("", split="train", is_training=True, seed=42, repeats=0.0, **common)
    test = create_dataset("", split="validation", is_training=False, **common)
    shared = {
        "input_size": config["input_size"],
        "batch_size": args.batch_size,
        "use_prefetcher": not args.no_prefetcher,
        "mean": config["mean"],
        "std": config["std"],
        "num_workers": args.workers,
        "distributed": False,
        "device": torch.device(args.device),
    }
    train_batches = create_loader(train, is_training=True, re_prob=0.0, color_jitter=0.4, hflip=0.5, **shared)
    test_batches = create_loader(test, is_training=False, crop_pct=config["crop_pct"], **shared)
    loss_of = make_loss(model, args)
    out = utils.get_outdir(args.output, args.experiment)
    saver = utils.CheckpointSaver(model, optimizer, args=args, model_ema=ema, checkpoint_dir=out, recovery_dir=out)
    schedule, epochs = create_scheduler_v2(optimizer, sched="cosine", num_epochs=args.epochs, warmup_epochs=0)
    for epoch in range(epochs):
        model.train()
        for images, target in train_batches:
            optimizer.zero_grad()
            loss = loss_of(images, target)
            loss.backward()
            optimizer.step()
            if ema is not None:
                ema.update(model)
        model.eval()
        with torch.no_grad():
            outputs, targets = (
                torch.cat(parts) for parts in zip(*((model(x), y) for x, y in test_batches), strict=True)
            )
        metrics = {
            "loss": torch.nn.functional.cross_entropy(outputs, targets).item(),
            "top1": 100 * (outputs.argmax(1) == targets).double().mean().item(),
        }
        utils.update_summary(
            epoch, {"loss": loss.item()}, metrics, filename=Path(out) / "summary.csv", write_header=epoch == 0
        )
        saver.save_checkpoint(epoch, metric=metrics["top1"])
        schedule.step(epoch + 1, metrics["top1"])


if __name__ == "__main__":
    main()
