"""A device to rehearse a GPU on: its tensors are its own, but their numbers lie and are computed on the CPU.

What a run on a GPU would trip over shows here. An operation on tensors of two devices is refused, and each
time that the CPU would have to wait for the device is counted: where a number is read, where a shape depends
on numbers, where something is copied without non_blocking. The scripts take the way that they take on a GPU,
as "cuda" in their source is read as this device's name. It says nothing about speed, about a GPU's own
kernels and rounding, or about several processes.

    python tests/second_device.py sft --steps 20 --out runs/rehearsal      what waited, and where

It stands on what PyTorch has for backends written in Python, which is experimental: see `supported`.
"""
import collections
import contextlib
import importlib
import importlib.machinery
import importlib.util
import json
import signal
import sys
import traceback
from pathlib import Path

import torch
import torch.utils.backend_registration as registration
from torch.utils._pytree import tree_map

NAME = "second"
ROOT = Path(__file__).resolve().parent.parent
supported = hasattr(registration, "_setup_privateuseone_for_python_backend")

# They read a number, or find out a shape that depends on numbers.
WAITING = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique", "_unique2"}
# They take indices from the CPU, which are copied to the device first, and turn booleans into numbers.
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
# They give a tensor another shape in place, which its stand-in can't follow.
RESHAPING = {"squeeze_", "unsqueeze_", "t_", "transpose_", "resize_", "set_", "as_strided_"}
# What a GPU's autocast does in low precision and in float32, as far as the project has it.
LOW = ("linear", "matmul", "mm", "addmm", "bmm", "scaled_dot_product_attention")
FULL = ("layer_norm", "rms_norm", "softmax.int", "log_softmax.int", "sum", "sum.dim_IntList", "cumsum",
        "exp", "log", "expm1")

# What a GPU has and the CPU lacks: {operation: the same by other means}.
SUBSTITUTES = {"aten.mm.dtype_out": lambda a, b, dtype, out: torch.mm(a.to(dtype), b.to(dtype), out=out),
               "aten.mm.dtype": lambda a, b, dtype: torch.mm(a.to(dtype), b.to(dtype))}

waits = collections.Counter()  # {"phase: file function": how often the CPU would have waited}
phase = ["loading"]  # what a run is doing, see `watch`
stop_after = [None]  # the step after which the run gets a signal to stop
generators = []  # those that were made for the device


def is_ours(file):
    """Whether a file is the project's own, in one of its rooms or at the top, and no test."""
    folder = Path(file).parent
    return folder == ROOT or (folder.parent == ROOT and (folder / "__init__.py").exists())


class Mixed(RuntimeError):
    """An operation on what lies on two devices."""


def count():
    """Count a wait, by the function of the project that is running."""
    codes = [frame.f_code for frame, _ in traceback.walk_stack(None)]
    codes = [code for code in codes if is_ours(code.co_filename)]
    # A comprehension has a frame of its own, except in new versions of Python.
    ours = [code for code in codes if not code.co_name.startswith("<")]
    where = f"{Path(ours[0].co_filename).name} {ours[0].co_name}" if ours else "?"
    waits[f"{phase[0]}: {where}"] += 1


class OnDevice(torch.Tensor):
    """A tensor on the device; `raw` has its numbers, on the CPU."""
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw):
        place = {"strides": raw.stride(), "dtype": raw.dtype, "device": torch.device(NAME, 0)}
        tensor = cls._make_wrapper_subclass(cls, raw.size(), **place)
        tensor.raw = raw
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operation, classes, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})

    def tolist(self):
        count()
        return self.raw.tolist()

    def numpy(self):
        raise Mixed(f"numpy: of a tensor on {NAME}")

    def new_tensor(self, data, dtype=None):
        return torch.tensor(data, dtype=dtype or self.dtype, device=self.device)

    def __matmul__(self, other):
        # PyTorch makes a matrix of a vector, and squeezes the product in place.
        if self.dim() == 1:
            return torch.matmul(self[None], other).squeeze(-2)
        return torch.matmul(self, other)

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copied = OnDevice(self.raw.detach().clone())
            if isinstance(self, torch.nn.Parameter):
                copied = torch.nn.Parameter(copied, False)
            memo[id(self)] = copied.requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __format__(self, form):
        return format(self.item(), form) if self.dim() == 0 else repr(self)

    def __repr__(self):
        return f"OnDevice({self.raw})"


def waits_for(name, args, kwargs, stays):
    """Whether the CPU waits for an operation. stays: what comes out of it lies on the device."""
    if name in ("_to_copy", "copy_"):
        source = args[0] if name == "_to_copy" else args[1]
        target_is_here = isinstance(args[0], OnDevice) if name == "copy_" else stays
        moves = isinstance(source, OnDevice) != target_is_here
        # What the CPU is to read must have arrived; what goes to the device may be under way.
        under_way = target_is_here and (kwargs.get("non_blocking") or True in args[2:])
        return moves and not under_way
    if name in INDEXING:
        indices = [index for index in args[1] if index is not None]
        if not all(isinstance(index, OnDevice) for index in indices):
            return True
        # One number can be written to all that booleans select without finding out where that is.
        fills = "put" in name and args[2].numel() == 1
        return not fills and any(index.dtype == torch.bool for index in indices)
    return name in WAITING


def compute(operation, args, kwargs):
    """Do an operation on the CPU: refused if it mixes devices, counted if the CPU would wait."""
    name = operation._schema.name.split("::")[1]
    ours, others, places = [], [], []

    def unwrap(x):
        if isinstance(x, OnDevice):
            ours.append(x)
            return x.raw
        if isinstance(x, torch.Tensor):
            others.append(x)
        elif isinstance(x, torch.device):
            places.append(x)
            return torch.device("cpu")
        return x

    raw_args, raw_kwargs = tree_map(unwrap, (args, kwargs))
    raw_kwargs.pop("pin_memory", None)
    stays = places[0].type == NAME if places else bool(ours)
    # A GPU takes a single number from the CPU, and indices.
    indices = [id(index) for index in args[1]] if name in INDEXING else []
    strangers = [tuple(x.shape) for x in others if x.dim() > 0 and id(x) not in indices]
    if ours and strangers and name not in ("_to_copy", "copy_"):
        raise Mixed(f"{name}: tensors on {NAME} and, of shape {strangers}, on the CPU")
    if name in RESHAPING:
        raise RuntimeError(f"{name}: a stand-in on {NAME} can't follow it")
    if waits_for(name, args, kwargs, stays):
        count()
    out = SUBSTITUTES.get(str(operation), operation)(*raw_args, **raw_kwargs)
    known = {id(x.raw): x for x in ours} | {id(x): x for x in others}

    def wrap(x):
        if not isinstance(x, torch.Tensor) or isinstance(x, OnDevice):
            return x
        if id(x) in known:
            return known[id(x)]
        return OnDevice(x) if stays else x

    return tree_map(wrap, out)


class Module:
    """torch.second: what PyTorch and the project ask torch.cuda."""
    is_available = is_initialized = is_bf16_supported = staticmethod(lambda **options: True)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    set_device = manual_seed = manual_seed_all = staticmethod(lambda *args: None)
    _is_in_bad_fork = staticmethod(lambda: False)
    device = staticmethod(contextlib.nullcontext)
    synchronize = staticmethod(lambda: count())
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])
    # Random numbers are drawn on the CPU.
    get_rng_state = staticmethod(lambda *args: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, *args: torch.set_rng_state(state))


def autocast_kernel(operation, dtype):
    """The operation with what is in low or single precision cast to dtype(), as a GPU's autocast has it."""
    def cast(x):
        is_eligible = isinstance(x, OnDevice) and x.is_floating_point() and x.dtype != torch.float64
        return x.to(dtype()) if is_eligible else x

    def kernel(*args, **kwargs):
        autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            return operation(*tree_map(cast, args), **tree_map(cast, kwargs))

    return kernel


def register():
    """Make the device known to PyTorch. Returns what must live as long as it is to be used."""
    registration._setup_privateuseone_for_python_backend(NAME, Module())
    libraries = [torch.library.Library(name, "IMPL") for name in ("_", "_", "aten")]
    fallback, no_autocast, aten = libraries
    fallback.fallback(lambda operation, *args, **kwargs: compute(operation, args, kwargs), "PrivateUse1")
    no_autocast.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for names, dtype in ((LOW, lambda: torch.get_autocast_dtype(NAME)), (FULL, lambda: torch.float32)):
        for name in names:
            packet, _, overload = name.partition(".")
            operation = getattr(getattr(torch.ops.aten, packet), overload or "default")
            aten.impl(name, autocast_kernel(operation, dtype), "AutocastPrivateUse1")
    # A model that moves keeps its parameters, and so shares them with whatever shared them before.
    torch.__future__.set_swap_module_params_on_conversion(True)
    replace_what_makes_tensors()
    return libraries


def replace_what_makes_tensors():
    """Let torch.tensor, torch.Generator and the like know the device."""
    tensor, full, random = torch.tensor, torch.full, torch.rand
    generator_of_the_cpu = torch.Generator

    def make_tensor(data, *, device=None, **options):
        made = tensor(data, **options)
        return made if device is None else made.to(device)

    def fill(*args, pin_memory=False, **options):
        return full(*args, **options)

    class Generator:
        def __new__(cls, device="cpu"):
            made = generator_of_the_cpu()
            if torch.device(device).type == NAME:
                generators.append(made)
            return made

    def draw(*size, generator=None, device=None, **options):
        on_device = device is not None and torch.device(device).type == NAME
        if generator is not None and on_device != (generator in generators):
            raise Mixed("rand: a generator of another device than that of the numbers")
        return random(*size, generator=generator, device=device, **options)

    torch.tensor = torch.as_tensor = make_tensor
    torch.full, torch.rand, torch.Generator = fill, draw, Generator


class Source(importlib.machinery.SourceFileLoader):
    """Reads a file of the project with the device's name in the place of CUDA's."""

    def get_code(self, name):
        source = self.get_source(name).replace('"cuda"', f'"{NAME}"').replace("torch.cuda", f"torch.{NAME}")
        return compile(source, self.path, "exec", dont_inherit=True)


class Finder:
    """Finds the files of the project for `Source`."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        file = ROOT / (name.replace(".", "/") + ".py")
        if not file.is_file() or not is_ours(file):
            return None
        return importlib.util.spec_from_file_location(name, file, loader=Source(name, str(file)))


@contextlib.contextmanager
def during(name):
    """What is counted meanwhile belongs to a phase of a step, except in an evaluation or a save."""
    before = phase[0]
    phase[0] = name if before == "step" else before
    try:
        yield
    finally:
        phase[0] = before


def watch(owner, name, what):
    """Let a function of the project be a phase of its own."""
    original = getattr(owner, name)

    def watched(*args, **options):
        with during(what):
            return original(*args, **options)

    setattr(owner, name, watched)


def watch_run(Run):
    """Let `phase` say what a run is doing, and stop the run where `stop_after` says."""
    steps, passes = Run.steps, Run.passes

    def watched_steps(self, first, total, evaluate=None):
        def evaluating(step):
            with during("evaluation"):
                evaluate(step)

        phase[0] = "step"
        yield from steps(self, first, total, evaluate and evaluating)

    def watched_passes(self, pieces, *modules, **options):
        if self.step == stop_after[0]:
            self.stop_signal = signal.SIGTERM
        around = phase[0]
        for piece in passes(self, pieces, *modules, **options):
            if around == "step":
                phase[0] = "pass with gradients" if modules else "pass without gradients"
            yield piece
            phase[0] = around

    Run.steps, Run.passes = watched_steps, watched_passes
    watch(Run, "_save", "save")
    watch(Run, "optimizer_step", "optimizer step")
    watch(Run, "_report_skipped", "log")
    watch(Run, "log", "log")


def run(words, stop=None):
    """Run a script, by its name and flags. stop: the step after which it gets a signal to end.

    Returns {"code": its exit code, "error": in a line, "waits": {where: how often}}.
    """
    from plumbing import run as runtime
    module = importlib.import_module(words[0])
    waits.clear()
    phase[0], stop_after[0], runtime.Run.current = "loading", stop, None
    code, error = 0, ""
    try:
        runtime.run_script(module.main, module.Config, "", words[1:])
    except SystemExit as ended:
        code = ended.code
    except Exception as raised:
        frames = traceback.extract_tb(raised.__traceback__)
        last = [frame for frame in frames if is_ours(frame.filename)][-1]
        code, error = 1, f"{Path(last.filename).name} {last.name}: {raised}"
    if runtime.Run.current and runtime.Run.current.lock:
        runtime.Run.current.lock.close()
    return {"code": code, "error": error, "waits": dict(waits.most_common())}


def main():
    """Run a script as the command line says, or several: [{"words", "stop"}] as JSON on standard input.

    The last line printed has what came of them.
    """
    sys.path.insert(0, str(ROOT))
    sys.meta_path.insert(0, Finder)
    torch.set_num_threads(1)
    libraries = register()
    import generate
    from plumbing import run as runtime
    watch(generate, "generate", "sampling")
    watch_run(runtime.Run)
    if sys.argv[1:]:
        print(json.dumps(run(sys.argv[1:]), indent=1))
    else:
        print(json.dumps([run(**words) for words in json.load(sys.stdin)]))
    del libraries


if __name__ == "__main__":
    main()
