"""The raw layouts that worlds can be written in, by the name `convert` has for them.

`coco-official` is a second layout of `coco`: COCO's own caption files instead of the Karpathy JSON.
"""

from data_tools.synthetic.caption_layouts import CAPTION_LAYOUTS
from data_tools.synthetic.layout import Layout
from data_tools.synthetic.packed_layouts import PACKED_LAYOUTS
from data_tools.synthetic.task_layouts import TASK_LAYOUTS

LAYOUTS: dict[str, Layout] = {**CAPTION_LAYOUTS, **TASK_LAYOUTS, **PACKED_LAYOUTS}
