"""A CUDA device for machines without one: tensors that say cuda:0 and keep their data on the CPU.

`install()` changes torch for good: use a process of its own. `record(function)` runs the function
and returns two things: for each stretch up to the end of a `backward()`, the places where the host
waits for the device; and the number of matrix products and convolutions of each dtype.

An error is raised where CUDA would raise one, since an operation mixes devices (it may take CPU
tensors without dimensions and, with a wait, CPU indices) or a product mixes dtypes; and also for a
loss that is not float32.

For torch's C++ code the tensors are on the meta device, since for CUDA tensors autograd asks the
driver. So CUDA's autocast is repeated here.
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

PRODUCT = re.compile("(add|b|badd)?(mm|mv)|dot|convolution(_backward)?|.*attention.*")
INDEXING = re.compile("(_unsafe_)?index|_?index_put_?(impl_)?")
WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}

# Of the operations that autocast changes: those that it runs in bfloat16, and those that it runs in
# the widest dtype of their inputs. All others run in float32.
BFLOAT16 = re.compile("conv|mm|matmul|mv$|linear$|einsum|addr|prelu|attention|vecdot|multi_dot|"
                      "cell")
WIDEST = re.compile("addc(div|mul)|atan2|bilinear|cross|(v|tensor)?dot|.*sampler|.*put|scatter_add")
AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)

waits = [[]]  # where the host waits, in each stretch
products = Counter()  # by dtype
library = operators.Library("aten", "IMPL")

# ---------------------------------------------------------------------------------- one operation


def dispatch(_, func, types, args=(), kwargs=None):
    """What torch calls for each operation: it is looked at, and then run on the CPU."""
    kwargs = kwargs or {}
    name = func.overloadpacket.__name__
    leaves = tree_leaves((args, kwargs))
    fake = [x for x in leaves if isinstance(x, FakeCuda)]
    host = [x for x in leaves if torch.is_tensor(x) and not isinstance(x, FakeCuda)]
    on_cuda = result_is_on_cuda(func, fake, args, kwargs)
    if not fake and not on_cuda:
        return func(*args, **kwargs)

    if name in ("_to_copy", "copy_"):
        source = args[1] if name == "copy_" else args[0]
        wait = copy_waits(isinstance(source, FakeCuda), on_cuda, kwargs.get("non_blocking"))
        host = []  # a copy may cross from one device to the other
    elif on_cuda and INDEXING.fullmatch(name):
        indices = [index for index in args[1] if index is not None]
        wait = indexing_waits(name, indices, args)
        may_be_on_host = {id(index) for index in indices}
        host = [x for x in host if id(x) not in may_be_on_host]
    else:
        wait = fake and WAITING & set(func.tags)
    if wait:
        waits[-1].append(f"{name} at {calling_line()}")

    if fake and host:
        only_scalars = on_cuda and name not in ("cat", "stack")
        if not only_scalars or any(x.dim() > 0 for x in host):
            raise RuntimeError(f"{name} mixes devices")
    if on_cuda and any(isinstance(x, torch.Generator) for x in leaves):
        raise RuntimeError(f"{name} mixes devices")  # the generator is the CPU's
    if fake and PRODUCT.fullmatch(name):
        dtypes = {x.dtype for x in fake if x.is_floating_point()}
        products.update(dtypes)
        if len(dtypes) > 1:
            raise RuntimeError(f"{name} mixes dtypes: {dtypes}")
    return run_on_cpu(func, fake, on_cuda, args, kwargs)


def result_is_on_cuda(func, fake, args, kwargs):
    if kwargs.get("device") is not None:
        return kwargs["device"].type != "cpu"
    if func._schema.is_mutable and torch.is_tensor(args[0]):  # in place
        return isinstance(args[0], FakeCuda)
    return len(fake) > 0


def copy_waits(from_cuda, to_cuda, non_blocking):
    """Copies to the device wait even if non_blocking: the memory is not pinned."""
    return from_cuda != to_cuda and (to_cuda or not non_blocking)


def indexing_waits(name, indices, args):
    """For indices from the CPU, and for masks, since their True values are counted: but not in
    x[mask] = number."""
    if not all(isinstance(index, FakeCuda) for index in indices):
        return True
    fills = "put" in name and args[2].numel() == 1
    masks = [index for index in indices if index.dtype in (torch.bool, torch.uint8)]
    return len(masks) > 0 and not fills


def calling_line():
    """-> file, number and text of the line outside torch and this file that runs the operation."""
    frames = [frame for frame in traceback.extract_stack()
              if frame.filename != __file__ and "-packages" not in frame.filename]
    return f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}"


def run_on_cpu(func, fake, on_cuda, args, kwargs):
    by_data = {id(x.on_cpu): x for x in fake}

    def unwrap(x):
        if isinstance(x, torch.device):
            return torch.device("cpu")
        return x.on_cpu if isinstance(x, FakeCuda) else x

    def wrap(x):
        if not torch.is_tensor(x):
            return x
        if id(x) in by_data:  # an operation in place returns its input
            return by_data[id(x)]
        return FakeCuda(x)

    out = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
    return tree_map(wrap, out) if on_cuda else out


class Mode(TorchDispatchMode):
    """Also operations without a tensor of ours among their inputs, like torch.zeros, come here."""

    __torch_dispatch__ = dispatch


# ------------------------------------------------------------------------------------- the tensor


def on_a_copy(name):
    """-> a method that copies the tensor to the CPU and calls the method of this name there."""
    def method(self, *args):
        return getattr(self.cpu(), name)(*args)

    return method


class FakeCuda(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl
    __torch_dispatch__ = classmethod(dispatch)
    __repr__ = on_a_copy("__repr__")
    __format__ = on_a_copy("__format__")
    __reduce_ex__ = on_a_copy("__reduce_ex__")  # for torch.save
    tolist = on_a_copy("tolist")
    is_meta = False

    def __new__(cls, data):
        self = torch.Tensor._make_wrapper_subclass(
            cls, data.shape, data.stride(), data.storage_offset(), dtype=data.dtype, device="meta",
            _extra_dispatch_keys=AUTOCAST)
        self.on_cpu = data
        return self

    @property
    def device(self):
        return torch.device("cuda", 0)

    @property
    def is_cuda(self):
        return True

    def new_tensor(self, data, dtype=None, device="cuda"):
        return torch.tensor(data, dtype=dtype or self.dtype, device=device)


# ------------------------------------------------------------------------------ changes to torch


def autocast(op, name, *args, **kwargs):
    """Run the operation of that name in the dtype that autocast gives it on CUDA."""
    floats = torch.bfloat16, torch.float32
    if BFLOAT16.search(name):
        dtype = torch.bfloat16
    elif WIDEST.fullmatch(name):
        widest = any(torch.is_tensor(x) and x.dtype == torch.float32 for x in tree_leaves(args))
        dtype = torch.float32 if widest else torch.bfloat16
    else:
        dtype = torch.float32

    def cast(x):
        return x.to(dtype) if isinstance(x, FakeCuda) and x.dtype in floats else x

    with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
        return op(*tree_map(cast, args), **tree_map(cast, kwargs))


def backward(loss, *args, cpu_backward=torch.Tensor.backward, **kwargs):
    """Tensor.backward, after which a new stretch begins."""
    if loss.dtype != torch.float32:
        raise RuntimeError(f"the loss is {loss.dtype}")
    cpu_backward(loss, *args, **kwargs)
    waits.append([])


def answer(value):
    """-> a function that returns this value for any arguments."""
    return lambda *args, **kwargs: value


def synchronize(device=None):
    torch.zeros((), device="cuda").item()  # a wait that is counted


def install():
    torch._C._ensureCUDADeviceGuardSet()  # both as FakeTensorMode does
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_swap_module_params_on_conversion(True)
    optimizer._foreach_supported_types.append(FakeCuda)
    _foreach_utils._foreach_supported_types.append(FakeCuda)
    torch.Tensor.backward = backward

    torch.cuda.is_available = answer(True)
    torch.cuda.is_bf16_supported = answer(True)
    torch.cuda.is_current_stream_capturing = answer(False)
    torch.cuda.device_count = answer(1)
    torch.cuda.current_device = answer(0)
    torch.cuda.mem_get_info = answer((2**34, 2**34))  # free and total, in bytes
    torch.cuda.set_device = answer(None)
    torch.cuda.manual_seed = answer(None)
    torch.cuda._lazy_init = answer(None)
    torch.cuda.synchronize = synchronize

    warnings.filterwarnings("ignore", "(?s).*previously registered kernel")
    for full_name in torch._C._dispatch_get_registrations_for_dispatch_key("AutocastCUDA"):
        name, _, overload = full_name.removeprefix("aten::").partition(".")
        if name != "binary_cross_entropy":  # which CUDA refuses
            op = getattr(getattr(torch.ops.aten, name), overload or "default")
            library.impl(op, partial(autocast, op, name), "AutocastCUDA")


def record(function):
    waits[:] = [[]]
    products.clear()
    with Mode():
        function()
    return waits, products
