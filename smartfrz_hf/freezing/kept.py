"""What somebody else does with the parameters of a unit that freezes."""

from collections.abc import Collection, Iterator

from torch import nn

from .._compat import has_gradient_hook
from ..model.units import BlockStack, Unit

# Parts of the names that PEFT gives to weights that are trained as a whole or row by row, beside its adapters.
TRAINED_BESIDE_ADAPTERS = {"modules_to_save", "trainable_tokens_delta"}


def kept_parameters(unit: Unit) -> dict[str, nn.Parameter]:
    """
    The trainable parameters of a unit that its user has picked to be trained, and that freezing leaves alone.

    These are what PEFT trains beside its adapters (`modules_to_save`, trainable tokens), and embedding tables with a gradient
    hook of their own, which is how some rows of a table are trained, such as those of new tokens.

    Args:
        unit ([`Unit`]): the unit, not frozen yet.

    Returns:
        `dict[str, torch.nn.Parameter]` by dotted name.
    """
    trainable = {name: p for name, p in unit.named_parameters().items() if p.requires_grad}
    kept = {name: p for name, p in trainable.items() if TRAINED_BESIDE_ADAPTERS & set(name.split("."))}
    tables = {module.weight for module in unit.submodules() if isinstance(module, nn.Embedding)}
    others = [p for p in trainable.values() if p not in tables]
    # Where hooks are on everything, such as those that clip gradients, they pick nothing.
    if not any(has_gradient_hook(p) for p in others):
        kept |= {name: p for name, p in trainable.items() if p in tables and has_gradient_hook(p)}
    return kept


def adapter_parameters(unit: Unit) -> Iterator[nn.Parameter]:
    """
    Parameters of PEFT's adapters in a unit. PEFT makes them trainable whenever adapters are switched on, as at the end of
    `with model.disable_adapter()`.
    """
    for layer in unit.submodules():
        for name in getattr(layer, "adapter_layer_names", ()):
            part = getattr(layer, name, None)
            if isinstance(part, nn.Module | nn.ParameterDict):
                yield from part.parameters()


def idle_features(unit: Unit) -> list[str]:
    """Names of what the Trainer does to the modules of a unit in training mode only, and which ends when the unit freezes."""
    noisy = any(hasattr(module, "neftune_noise_alpha") for module in unit.submodules())
    return ["NEFTune (`neftune_noise_alpha`)"] if noisy else []


def tied_names(stack: BlockStack, units: list[Unit], frozen: Collection[nn.Parameter]) -> list[str]:
    """Parameters outside all units that are the same as a frozen one in some units, as `name (tied to name)`."""
    names = {p: name for unit in units for name, p in unit.named_parameters().items() if p in frozen}
    inside = {name for unit in stack.units for name in unit.named_parameters()}
    return [
        f"{name} (tied to {names[p]})"
        for name, p in stack.model.named_parameters(remove_duplicate=False)
        if p in names and name not in inside
    ]
