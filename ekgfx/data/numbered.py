"""Samples' numbers for loaders that don't give them: which row of a memory bank is whose."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler

from ekgfx.data.batches import INDEX


class _Numbered(Dataset):
    """The same samples, each with its number."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> tuple[int, Any]:
        return number, self.dataset[number]

    def __getitems__(self, numbers: list[int]) -> list[tuple[int, Any]]:
        at_once = getattr(self.dataset, "__getitems__", None)
        samples = [self.dataset[number] for number in numbers] if at_once is None else at_once(numbers)
        return list(zip(numbers, samples, strict=True))


class _Collate:
    """What the loader's own function makes of the samples, with their numbers where a batch has none."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate

    def __call__(self, pairs: list[tuple[int, Any]]) -> Any:
        numbers = [number for number, _ in pairs]
        batch = self.collate([sample for _, sample in pairs])
        if isinstance(batch, Mapping):
            return batch if any(key in batch for key in INDEX) else {**batch, INDEX[0]: numbers}
        if isinstance(batch, Tensor):
            return batch, None, numbers
        if isinstance(batch, tuple | list) and len(batch) in (1, 2):
            return (*batch, *[None] * (2 - len(batch)), numbers)
        return batch


def numbered(batches: Any, in_order: bool = False) -> Any:
    """A DataLoader whose batches also say which samples they hold, in whatever order it draws them: `(inputs, labels)`
    becomes `(inputs, labels, index)`, a mapping gets an `index`. Batches that say so already stay as they are, and so
    does what is no plain DataLoader over samples by number. in_order: all samples, by ascending number."""
    if type(batches) is not DataLoader or batches.batch_sampler is None or isinstance(batches.dataset, IterableDataset):
        return batches
    sampler = batches.batch_sampler
    if in_order and batches.batch_size is not None:
        everything = range(len(batches.dataset))  # type: ignore[arg-type]  # torch's Dataset does not declare it
        sampler = BatchSampler(SequentialSampler(everything), batches.batch_size, drop_last=False)
    return DataLoader(
        _Numbered(batches.dataset),
        batch_sampler=sampler,
        num_workers=batches.num_workers,
        collate_fn=_Collate(batches.collate_fn),
        pin_memory=batches.pin_memory,
        timeout=batches.timeout,
        worker_init_fn=batches.worker_init_fn,
        multiprocessing_context=batches.multiprocessing_context,
        generator=batches.generator,
        prefetch_factor=batches.prefetch_factor,
        persistent_workers=batches.persistent_workers,
    )
