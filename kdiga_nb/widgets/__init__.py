"""The explorer of ``notebooks/explore.ipynb``: pure ``compute(state)``, pure ``draw(data)``, a thin ``Explorer``."""

from kdiga_nb.widgets.drawing import draw, image_bytes, table
from kdiga_nb.widgets.explorer import Explorer
from kdiga_nb.widgets.missions import missions
from kdiga_nb.widgets.views import State, compute, words
