"""LoRA-Edge for PyTorch: adapt a pre-trained CNN by training its output-side tensor-train cores (arXiv 2511.03765).

lora_edge.adapt(model, rank=2)                                  # in place; the output stays the same
optimizer = torch.optim.Adam(lora_edge.trainable_parameters(model), lr=2e-2)
...                                                             # train as usual
lora_edge.save_adapter(model, "me.safetensors")                 # kilobytes
lora_edge.merge(model)                                          # plain nn.Conv* again
"""

from lora_edge.environment.torch_version import check_torch_version

check_torch_version()

from lora_edge import ops  # noqa: E402
from lora_edge._version import VERSION  # noqa: E402
from lora_edge.adapt import adapt, trainable_parameters  # noqa: E402
from lora_edge.adapter_file import load_adapter, save_adapter  # noqa: E402
from lora_edge.calibration import calibrate_bn  # noqa: E402
from lora_edge.disabled import disabled  # noqa: E402
from lora_edge.merge import merge  # noqa: E402
from lora_edge.nn.layers import LoRAEdgeConv1d, LoRAEdgeConv2d, LoRAEdgeConv3d  # noqa: E402
from lora_edge.ops import backends  # noqa: E402
from lora_edge.summary import summary  # noqa: E402
from lora_edge.tt import tt_contract, tt_svd  # noqa: E402

__version__ = VERSION

__all__ = [
    "LoRAEdgeConv1d",
    "LoRAEdgeConv2d",
    "LoRAEdgeConv3d",
    "adapt",
    "backends",
    "calibrate_bn",
    "disabled",
    "load_adapter",
    "merge",
    "ops",
    "save_adapter",
    "summary",
    "trainable_parameters",
    "tt_contract",
    "tt_svd",
]
