"""A CUDA device for machines without one: tensors that say cuda:0 and keep their data on the CPU.

`install()` changes torch for good: use a process of its own. `record(function)` runs the function
and -> for each stretch up to the end of a `backward()`, the places where the host waits for the
device; and the number of matrix products and convolutions of each dtype. It raises where an
operation mixes devices in another way than CUDA takes (CPU tensors without dimensions; indices,
with a wait), where a product mixes dtypes, and for a loss that is not float32. In C++ the tensors
are of the meta device: about CUDA's, autograd asks the driver. So its autocast is repeated here.
"""

import re
import traceback
import warnings
from collections import Counter
from functools import partial

import torch
from torch import library as operators
from torch.optim import optimizer
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)
LOW = re.compile("conv|mm|matmul|mv$|linear$|einsum|addr|prelu|attention|vecdot|multi_dot|cell")
WIDEST = re.compile("addc(div|mul)|atan2|bilinear|cross|(v|tensor)?dot|.*sampler|.*put|scatter_add")
PRODUCT = re.compile("(add|b|badd)?(mm|mv)|dot|convolution(_backward)?|.*attention.*")
WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
waits, products, library = [[]], Counter(), operators.Library("aten", "IMPL")


def dispatch(_, func, types, args=(), kwargs=None):
    kwargs, name = kwargs or {}, func.overloadpacket.__name__
    leaves, device = tree_leaves((args, kwargs)), kwargs.get("device")
    fake = [x for x in leaves if isinstance(x, FakeCuda)]
    host = [x for x in leaves if torch.is_tensor(x) and not isinstance(x, FakeCuda)]
    on_cuda, wait = bool(fake), fake and WAITING & set(func.tags)
    if device is not None:
        on_cuda = device.type != "cpu"
    elif func._schema.is_mutable and torch.is_tensor(args[0]):
        on_cuda = isinstance(args[0], FakeCuda)
    if not fake and not on_cuda:
        return func(*args, **kwargs)
    if name in ("_to_copy", "copy_"):
        crosses = on_cuda != isinstance(args[name == "copy_"], FakeCuda)
        wait, host = crosses and (on_cuda or not kwargs.get("non_blocking")), []
    elif on_cuda and re.fullmatch("(_unsafe_)?index|_?index_put_?(impl_)?", name):
        indices = [i for i in args[1] if i is not None]
        masks = [i for i in indices if i.dtype in (torch.bool, torch.uint8)]
        fills = "put" in name and args[2].numel() == 1  # x[mask] = number
        wait = masks and not fills or not all(isinstance(i, FakeCuda) for i in indices)
        host = [h for h in host if all(h is not i for i in indices)]
    if wait:
        at = [frame for frame in traceback.extract_stack() if frame.filename != __file__
              and "-packages" not in frame.filename][-1]
        waits[-1].append(f"{name} at {at.filename}:{at.lineno}: {at.line}")

    strict = not on_cuda or name in ("cat", "stack")
    if fake and any(strict or h.dim() for h in host) or on_cuda and any(
            isinstance(x, torch.Generator) for x in leaves):
        raise RuntimeError(f"{name} mixes devices")
    if fake and PRODUCT.fullmatch(name):
        dtypes = {x.dtype for x in fake if x.is_floating_point()}
        products.update(dtypes)
        if len(dtypes) > 1:
            raise RuntimeError(f"{name} mixes dtypes: {dtypes}")

    def unwrap(x):
        x = torch.device("cpu") if isinstance(x, torch.device) else x
        return x.on_cpu if isinstance(x, FakeCuda) else x

    def wrap(x):
        return known[id(x)] if id(x) in known else FakeCuda(x) if torch.is_tensor(x) else x

    known = {id(x.on_cpu): x for x in fake}  # what in-place operations return
    out = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
    return tree_map(wrap, out) if on_cuda else out


class Mode(TorchDispatchMode):
    __torch_dispatch__ = dispatch


class FakeCuda(torch.Tensor):
    device, is_cuda = property(lambda _: torch.device("cuda", 0)), property(lambda _: True)
    is_meta, __torch_function__ = False, torch._C._disabled_torch_function_impl
    __torch_dispatch__ = classmethod(dispatch)

    def __new__(cls, data):
        self = torch.Tensor._make_wrapper_subclass(
            cls, data.shape, data.stride(), data.storage_offset(), dtype=data.dtype, device="meta",
            _extra_dispatch_keys=AUTOCAST)
        self.on_cpu = data
        return self

    def new_tensor(self, data, **options):
        return torch.tensor(data, **{"dtype": self.dtype, "device": "cuda", **options})


for method in "tolist", "__repr__", "__format__", "__reduce_ex__":  # the last for torch.save
    setattr(FakeCuda, method, lambda self, *args, method=method: getattr(self.cpu(), method)(*args))


def autocast(op, name, *args, **kwargs):
    """The operation of that name in the dtype that autocast gives it on CUDA."""
    floats = torch.bfloat16, torch.float32
    wide = any(torch.is_tensor(x) and x.dtype == torch.float32 for x in tree_leaves(args))
    dtype = floats[wide if WIDEST.fullmatch(name) else not LOW.search(name)]

    def cast(x):
        return x.to(dtype) if isinstance(x, FakeCuda) and x.dtype in floats else x

    with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
        return op(*tree_map(cast, args), **tree_map(cast, kwargs))


def backward(loss, *args, cpu_backward=torch.Tensor.backward, **kwargs):
    if loss.dtype != torch.float32:
        raise RuntimeError(f"the loss is {loss.dtype}")
    cpu_backward(loss, *args, **kwargs)
    waits.append([])


def install():
    torch._C._ensureCUDADeviceGuardSet()  # both as FakeTensorMode does
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_swap_module_params_on_conversion(True)
    optimizer._foreach_supported_types.append(FakeCuda)
    _foreach_utils._foreach_supported_types.append(FakeCuda)
    torch.Tensor.backward = backward
    for name, answer in {
            "is_available": True, "device_count": 1, "current_device": 0, "set_device": None,
            "mem_get_info": (2**34, 2**34), "max_memory_allocated": 0, "manual_seed": None,
            "is_bf16_supported": True, "is_current_stream_capturing": False, "_lazy_init": None,
    }.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
    torch.cuda.synchronize = lambda *args: torch.zeros((), device="cuda").item()
    warnings.filterwarnings("ignore", "(?s).*previously registered kernel")
    for full in torch._C._dispatch_get_registrations_for_dispatch_key("AutocastCUDA"):
        name, _, overload = full.removeprefix("aten::").partition(".")
        if name != "binary_cross_entropy":  # which CUDA refuses
            op = getattr(getattr(torch.ops.aten, name), overload or "default")
            library.impl(op, partial(autocast, op, name), "AutocastCUDA")


def record(function):
    waits[:] = [[]]
    products.clear()
    with Mode():
        function()
    return waits, products
