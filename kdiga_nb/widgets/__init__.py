"""The explorer of ``notebooks/explore.ipynb``: pure ``compute(state)``, pure ``draw(data)``, a thin ``Explorer``."""

import gc

from kdiga_nb.widgets.drawing import draw, image_bytes, table
from kdiga_nb.widgets.explorer import Explorer
from kdiga_nb.widgets.views import State, compute, words

__all__ = ["Explorer", "State", "compute", "draw", "image_bytes", "table", "words"]

# What is imported by now lives as long as the kernel. A full garbage collection that looks at all of it takes some
# 200 ms, and drawing sets one off every few pictures.
gc.collect()
gc.freeze()
