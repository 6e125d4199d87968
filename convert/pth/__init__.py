"""Files that ``torch.save`` wrote, read without torch: nothing in them is run, tensors stay on disk until asked for.

``open_pth`` opens one: a zip archive (:mod:`convert.pth.archive`) with a pickle of what was saved
(:mod:`convert.pth.unpickler`) and one entry for every storage that its tensors lie in (:mod:`convert.pth.tensors`).
"""

from convert.pth.file import PthFile, open_pth
from convert.pth.tensors import PthTensor

__all__ = ["PthFile", "PthTensor", "open_pth"]
