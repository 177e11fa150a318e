"""What every swapped class shares: how it is copied, pickled and moved."""

from __future__ import annotations

import copy
import copyreg
import types
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Proxy

from fastdl.ops.packed import PackedWeight, pack_bytes


def method_named(name: str, function: types.FunctionType) -> types.FunctionType:
    """A copy of a stock class's method under another name: the script compiler goes by names, and takes each once."""
    twin = types.FunctionType(
        function.__code__, function.__globals__, name, function.__defaults__, function.__closure__
    )
    twin.__annotations__, twin.__doc__ = function.__annotations__, function.__doc__
    return twin


def traced_call(module: torch.nn.Module, proxy: Proxy, *args: Any) -> Proxy:
    """One node of the proxy's torch.fx graph that calls the module, as torch's tracer makes of each of torch.nn's."""
    return proxy.tracer.create_proxy("call_module", proxy.tracer.path_of_module(module), args, {})


class Swapped:
    """Mixed in before a stock class. An instance has the stock instance's attributes and, while frozen, a pack.

    The pack is derived from the weight: it is in no state dict, and copying, pickling, moving, converting or loading
    drops it.
    """

    stock_class: ClassVar[type[torch.nn.Module]]  # what `restore` and pickles turn an instance into
    packed_weight: ClassVar[str | None] = "weight"  # the parameter that `freeze` packs; None: the layer has none itself
    unpackable: ClassVar[str | None] = None  # why `freeze` cannot pack that parameter
    _pack = None  # what make_pack gives, set by `freeze`; not annotated, since the script compiler reads annotations

    def drop_pack(self) -> None:
        """Read the weight itself again from now on."""
        self.__dict__.pop("_pack", None)

    def pack_size(self) -> int:
        """Bytes of the pack of this layer."""
        return pack_bytes(getattr(self, self.packed_weight))

    def pack_key(self) -> Any:
        """Layers of equal keys share a pack: by identity of the weight."""
        return id(getattr(self, self.packed_weight))

    def make_pack(self, name: str) -> Any:
        """The pack of this layer, for the weight as it is; name: for messages."""
        return PackedWeight.of(getattr(self, self.packed_weight), name)

    def __reduce_ex__(self, protocol: int) -> Any:
        # Whole-model pickles must load where fastdl is not installed. Subclasses (parametrised, FSDP2, the user's
        # own) are not ours to rename.
        stock = type(self).__dict__.get("stock_class")
        if stock is None:
            return super().__reduce_ex__(protocol)
        # The standard library's "object of this class, then its state": copyreg.__newobj__ insists on our own class.
        return copyreg._reconstructor, (stock, object, None), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        return self._attributes()

    def __copy__(self) -> Any:
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self._attributes())
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self._attributes(), memo))
        return twin

    def _attributes(self) -> dict[str, Any]:
        """What a stock instance would hold."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_pack", "_fold")}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.drop_pack()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.drop_pack()
        super()._load_from_state_dict(*args, **kwargs)

    def _get_name(self) -> str:
        return f"fastdl.{type(self).__name__}"
