"""Pruning and teaching inside other libraries' training loops: Lightning (`ekgfx.callbacks.lightning`), Hugging Face's
Trainer (`ekgfx.callbacks.transformers`), Ultralytics (`ekgfx.callbacks.ultralytics`). Each needs its library, which is
no dependency of ekgfx."""
