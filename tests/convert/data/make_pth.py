"""Writes the .pth files next to this script with torch, which the tests themselves do not need.

python tests/convert/data/make_pth.py      (torch 2.13.0 wrote the files that are here)
"""

import argparse
import collections
import pathlib

import torch

HERE = pathlib.Path(__file__).parent
TYPES = ["float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool", "uint16"]

whole = torch.arange(24, dtype=torch.float32).reshape(4, 6)
layouts = collections.OrderedDict(
    whole=whole,
    transposed=whole.t(),
    part=whole[1:3, 2::2],
    scalar=whole[2, 3],
    none=torch.zeros(0, 4),
    repeated=torch.tensor([2.5]).expand(3, 5),
    parameter=torch.nn.Parameter(torch.ones(2)),
)
layouts["tied"] = layouts["whole"]
types = {name: torch.tensor([[1, 0, 3]]).to(getattr(torch, name)) for name in TYPES}
linear = torch.nn.Linear(2, 3)
with torch.no_grad():
    linear.weight.copy_(torch.arange(6).reshape(3, 2))
    linear.bias.zero_()

FILES = {
    "layouts": layouts,
    "types": types,
    "training": {
        "args": argparse.Namespace(lr=1e-3, bf16=True),
        "arch": "infinity_2b",
        "iter": 70_000,
        "seed": 2**63 + 5,
        "milestones": [1, -5, 2.5, None, (), b"raw", b"", {}],
        "size": torch.Size([1, 2]),
        "dtype": torch.bfloat16,
        "device": torch.device("cuda", 1),
        "trainer": {"gpt_fsdp": linear.state_dict(), "gpt_opt": {"state": {0: {"step": torch.tensor(7.0)}}}},
    },
    "bare": torch.arange(3),
    "module": linear,
    "sparse": {"w": torch.ones(2).to_sparse()},
    "quantised": {"w": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)},
    "complex": {"w": torch.ones(2, dtype=torch.complex64)},
    "negated": {"w": torch.ones(2, dtype=torch.complex64).conj().imag},
    "float8": {"w": torch.ones(2).to(torch.float8_e4m3fn)},
    "storage": {"w": torch.ones(2).untyped_storage()},
}

for name, value in FILES.items():
    torch.save(value, HERE / f"{name}.pth")
torch.save(layouts, HERE / "protocol4.pth", pickle_protocol=4)
torch.save(types, HERE / "legacy.pth", _use_new_zipfile_serialization=False)
torch.jit.save(torch.jit.script(linear), HERE / "script.pth")
