"""Networks of Ultralytics, by their YAML files, with random weights."""

from typing import Any

from parts.networks import Make, Network, images


def batch_for(task: str, image: Any) -> dict[str, Any]:
    """A batch as the trainer of a task makes it."""
    import torch

    if task == "classify":
        return {"img": image, "cls": torch.zeros(len(image), dtype=torch.long)}
    box = [0.5, 0.5, 0.4, 0.3, *([0.1] if task == "obb" else [])]
    batch = {"img": image, "batch_idx": torch.tensor([0.0, 1.0]), "cls": torch.zeros(2, 1)}
    batch["bboxes"] = torch.tensor([box, box])
    size = image.shape[-1] // 4
    return batch | {"masks": torch.ones(2, size, size), "keypoints": torch.full((2, 17, 3), 0.5)}


def named(file: str) -> Make:
    """The network of a YAML file, its predictor, loss and fusion, and the library's own export."""

    def make() -> Network:
        import numpy as np
        import torch
        from ultralytics import RTDETR, YOLO
        from ultralytics.cfg import get_cfg

        yolo: Any = (RTDETR if "rtdetr" in file else YOLO)(f"{file}.yaml")

        def use(pruned: Any) -> None:
            yolo.model, yolo.predictor = pruned.float().eval(), None
            yolo.predict(np.zeros((96, 96, 3), dtype=np.uint8), imgsz=96, verbose=False)
            known, pruned.args = pruned.args, get_cfg()  # gains of the losses; a checkpoint has them
            pruned.nc = len(pruned.names)  # as the trainer sets it
            loss, _ = pruned.train()(batch_for(yolo.task, torch.rand(2, 3, 96, 96)))
            loss.sum().backward()
            pruned.criterion, pruned.args = None, known
            pruned.double().eval()

        def export(pruned: Any) -> None:
            import tempfile
            from pathlib import Path

            with tempfile.TemporaryDirectory() as folder:
                yolo.model, yolo.predictor = pruned.float().eval(), None
                pruned.pt_path = str(Path(folder) / "model.pt")
                yolo.export(format="onnx", imgsz=64, dynamic=True, simplify=False, verbose=False)
                runs_as(pruned, Path(folder) / "model.onnx")

        return Network(yolo.model, images(64, 96), use, export=export)

    return make


def runs_as(pruned: Any, path: Any) -> None:
    """The file, on another batch and size, is what the network is after fusion."""
    import onnxruntime
    import torch

    image = torch.rand(3, 3, 96, 96)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: image.numpy()})[0])
    with torch.no_grad():
        wanted = pruned(image)
    while not isinstance(wanted, torch.Tensor):
        wanted = wanted[0]
    if "RTDETR" in type(pruned).__name__:  # queries come in the order of scores, which are all alike here
        apart = torch.cdist(found, wanted, p=torch.inf)
        off = max(float(apart.amin(dim).max()) for dim in (1, 2))
    else:
        off = float((found - wanted).abs().max())
    assert off < 1e-3 * float(wanted.abs().max()), f"off by {off:.1e}"


def networks() -> dict[str, Make]:
    files = "yolov8n yolov8n-seg yolov8n-pose yolov8n-cls yolov8n-obb yolov5n yolov6n yolov8n-ghost yolov3-tiny"
    files += " yolov9t yolov10n yolo11n yolo11n-seg yolo11n-pose yolo11n-cls yolo11n-obb yolo12n yolo12n-seg"
    files += " yolo26n yolov8n-rtdetr rtdetr-resnet50"
    return {file: named(file) for file in files.split()}
