"""Which module of a model an attention layer was put into.

vLLM tells an attention impl neither its layer's name nor the module beside which it stands, where the rotary embedding
is. PyTorch tells everyone who asks when a module is put into another.
"""

import weakref
from typing import Any

import torch
from farspan.engine_ext.errors import UnsupportedModelError
from torch.nn.modules.module import register_module_module_registration_hook


class LayerOwner:
    """Watches the construction of a model for the layer of one impl, until the model is loaded."""

    def __init__(self, impl: Any) -> None:
        """impl: an attention impl under construction; its layer will have it as `impl`."""
        self.layer_name = ""
        # Weak, since the owner holds the layer, which holds the impl.
        self.owner: weakref.ref[torch.nn.Module] | None = None
        self.impl = weakref.ref(impl)
        self.hook = register_module_module_registration_hook(self.notice)

    def notice(self, owner: torch.nn.Module, name: str, child: Any) -> None:
        """Called by PyTorch for every `child` that becomes `owner`'s attribute `name`."""
        # The hook stays: PyTorch is iterating over all of them.
        if self.owner is None and child is not None and getattr(child, "impl", None) is self.impl():
            self.owner = weakref.ref(owner)
            self.layer_name = child.layer_name

    def found(self) -> tuple[torch.nn.Module, str]:
        """The module that holds the layer, and the layer's name; watches no longer.

        Raises UnsupportedModelError where the layer was put into no module.
        """
        self.hook.remove()
        owner = self.owner() if self.owner is not None else None
        if owner is None:
            raise UnsupportedModelError(
                "string needs the module that holds each attention layer; this model keeps an attention layer outside "
                "its modules. Leave out the option string."
            )
        return owner, self.layer_name
