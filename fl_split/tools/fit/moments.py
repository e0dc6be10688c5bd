"""Where a fit starts: each linear as a product of two thin matrices that keeps what public text needs of it.

One layer at a time: from what went into it, recorded once, and the gradient at its output, its linears' second moments
are taken, the linears are cut, and the gradient at its input is handed to the layer before it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fl_split.errors import ConfigError
from fl_split.model.loading import boundaries_of
from fl_split.model.thin import linears
from fl_split.tools.fit.folder import Fit, FitFolder, Stage
from fl_split.tools.fit.lessons import Batches, LayerCall, tapped

# Flattening of the second moments: at 0 the SVD keeps what the recorded text needs, at infinity it is the plain one.
# The Jacobian meets every direction of the input, so its moment is flattened more.
_FLATTEN_INPUT, _FLATTEN_GRADIENT = 4.0, 0.3
_LEAST_RANK = 4
ROOM_FOR_CHOICE = 8  # a linear's rank is at most so many times what it would be if all had the same
MOMENT_BATCHES = 64

Moments = dict[str, tuple[Tensor, Tensor]]  # by linear: E[x x^T] and E[g g^T], times the number of tokens
Shapes = dict[int, dict[str, tuple[int, int]]]  # by layer and linear: out, in


@dataclass(frozen=True)
class Budget:
    """What the thin layers may have in all."""

    shapes: Shapes
    numbers: float  # weights of their thin matrices

    @classmethod
    def of(cls, layers: Mapping[int, nn.Module], hidden_size: int, fit: Fit) -> "Budget":
        """Count what is left for the thin matrices, so that the surrogate costs `fit.layers` layers.

        Memory: norms and biases of every layer are paid for. Compute: so are the attention scores of the layers above
        the budget, causal, at the sequences' length: (length + 1) * hidden multiplications per token and layer.

        Args:
            layers: The trunk's, by index; they need no weights.
            hidden_size: Of the model.
            fit: Its budget, and how many layers stay whole.

        Raises:
            ConfigError: The budget does not lie between the smallest thin copy and the trunk itself.
        """
        if not 0 < fit.layers < len(layers):
            raise ConfigError(f"--layers {fit.layers:g}: expected more than 0 and less than the trunk's {len(layers)}")
        if not 0 <= fit.whole < fit.layers:
            raise ConfigError(
                f"--whole {fit.whole}: expected less than --layers {fit.layers:g}, which counts whole layers as well"
            )
        thin = dict(list(layers.items())[fit.whole :])
        shapes = {i: {name: _shape(m) for name, m in linears(layer).items()} for i, layer in thin.items()}
        size = sum(p.numel() for layer in thin.values() for p in layer.parameters())
        matrices = sum(a * b for layer in shapes.values() for a, b in layer.values())
        left = fit.layers - fit.whole
        attention = (len(thin) - left) * (fit.length + 1) * hidden_size
        budget = cls(shapes, left * size / len(thin) - (size - matrices) - attention)
        if budget.numbers < _LEAST_RANK * budget.one_rank:
            raise ConfigError(
                f"--layers {fit.layers:g} is too small for a thin copy of {len(thin)} layers beside {fit.whole} whole "
                "ones: give more"
            )
        return budget

    @property
    def one_rank(self) -> int:
        """Weights that all linears have together for one rank each."""
        return sum(a + b for layer in self.shapes.values() for a, b in layer.values())

    def choose(self, energies: Mapping[tuple[int, str], Tensor]) -> dict[tuple[int, str], int]:
        """Decide ranks over all linears at once, by the energy E[(g^T dW x)^2] that a direction carries per weight."""
        bids: list[tuple[float, int, tuple[int, str]]] = []
        for (i, name), values in energies.items():
            cost = sum(self.shapes[i][name])
            bids += [
                (math.inf if r < _LEAST_RANK else e / cost, cost, (i, name)) for r, e in enumerate(values.tolist())
            ]
        ranks, left = dict.fromkeys(energies, 0), self.numbers
        for _, cost, key in sorted(bids, key=lambda bid: -bid[0]):
            if cost <= left:
                ranks[key], left = ranks[key] + 1, left - cost
        return ranks


def cut_layers(teacher: PreTrainedModel, public: Tensor, budget: Budget, fit: Fit, folder: FitFolder) -> None:
    """Keep each of the trunk's layers cut, with more ranks than it will have; goes on where it was."""
    todo = [i for i in budget.shapes if not folder.has(f"cut-{i}")]
    if not todo:
        return
    batches, cut = Batches(teacher, fit), boundaries_of(teacher)
    num_batches = min(MOMENT_BATCHES, max(1, len(public) // fit.batch_size))
    progress = Stage("inputs of layers", num_batches)
    for b in range(num_batches):
        if folder.has(f"inputs-{b}"):
            continue
        ids, labels = batches.draw(public, b, 0, random_tokens=True)
        with tapped(teacher, (*budget.shapes, cut.end), cut.end) as seen, torch.enable_grad():
            (g2,) = torch.autograd.grad(teacher(input_ids=ids, labels=labels).loss, seen[cut.end].hidden_states)
        folder.save(f"inputs-{b}", {**{str(i): call.hidden_states for i, call in seen.items()}, "gradient": g2})
        progress.step(b + 1)
    with tapped(teacher, todo, -1) as calls, torch.no_grad():
        teacher(input_ids=batches.draw(public, 0, 0, random_tokens=True)[0])
    gradients = {str(b): folder.load_one(f"inputs-{b}", "gradient") for b in range(num_batches)}
    if folder.has(f"gradient-{max(todo) + 1}"):
        gradients = folder.load(f"gradient-{max(todo) + 1}")
    layers = teacher.base_model.get_submodule(cut.layers_path)
    most = max(_LEAST_RANK, round(ROOM_FOR_CHOICE * budget.numbers / budget.one_rank))
    progress = Stage("layers cut", len(todo))
    for done, i in enumerate(reversed(todo), 1):
        layer = layers.get_submodule(str(i))
        # In the order of their numbers, not of a file: on that the last bits of a sum depend.
        inputs = {str(b): folder.load_one(f"inputs-{b}", str(i)) for b in range(num_batches)}
        moments, gradients = moments_of(layer, calls[i], inputs, gradients)
        folder.save(f"gradient-{i}", gradients)
        folder.save(f"cut-{i}", _cut_layer(layer, moments, most))
        folder.drop(f"gradient-{i + 1}")
        progress.step(done)
    folder.drop("inputs-*")


def moments_of(
    layer: nn.Module, call: LayerCall, inputs: dict[str, Tensor], gradients: dict[str, Tensor]
) -> tuple[Moments, dict[str, Tensor]]:
    """Second moments of a layer's linears, and the gradients at its input.

    Args:
        layer: One of the trunk's.
        call: How the model calls it.
        inputs: Its input of each batch, ``[batch, seq, hidden]``.
        gradients: dL/d(its output) of each batch.
    """
    sums: Moments = {}

    def add(name: str, place: int, rows: Tensor) -> None:
        rows = rows.detach().flatten(0, -2).float()
        sums[name][place].addmm_(rows.T, rows)

    def listen(name: str, module: nn.Module) -> Any:
        out, into = (torch.zeros(n, n, device=call.hidden_states.device) for n in _shape(module))
        sums[name] = (into, out)

        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            add(name, 0, args[0])
            out.register_hook(lambda gradient: add(name, 1, gradient))

        return module.register_forward_hook(hook)

    handles = [listen(name, module) for name, module in linears(layer).items()]
    device, before = call.hidden_states.device, {}
    for b, hidden_states in inputs.items():
        h = hidden_states.to(device).requires_grad_()
        with torch.enable_grad():
            out = layer(h, *call.args, **call.kwargs)
            out = out[0] if isinstance(out, tuple) else out
        (gradient,) = torch.autograd.grad(out, h, gradients[b].to(device))
        before[b] = gradient.cpu()
    for handle in handles:
        handle.remove()
    return sums, before


def _cut_layer(layer: nn.Module, moments: Moments, most: int) -> dict[str, Tensor]:
    """Make a thin layer's weights, with at most so many ranks, and beside them the energy of each rank."""
    cut = {name: tensor.float() for name, tensor in layer.state_dict().items()}
    for name, module in linears(layer).items():
        x, g = moments[name]
        a, b, s = thin_product(_weight(module), _flat(x, _FLATTEN_INPUT), _flat(g, _FLATTEN_GRADIENT))
        energy = s.square() * x.diagonal().mean() * g.diagonal().mean()
        del cut[f"{name}.weight"]
        cut |= {f"{name}.A": a[:most].float(), f"{name}.B": b[:, :most].float(), f"{name}.energy": energy[:most]}
    return cut


def thin_product(weight: Tensor, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Write W, ``[out, in]``, as B A so that the first r ranks are the best ones for E[(g^T dW x)^2].

    With G = C C^T and C^T W X W^T C = U s^2 U^T it is A = s^-1/2 U^T C^T W, B = C^-T U s^1/2: of the two moments only
    that of the shorter side is taken apart.

    Args:
        weight: W.
        x: Second moment of its input, positive definite.
        g: Second moment of the gradient at its output, positive definite.

    Returns:
        A ``[rank, in]``, B ``[out, rank]`` and s ``[rank]``, descending; in float64.
    """
    if len(weight) > weight.shape[1]:
        a, b, s = thin_product(weight.T, g, x)
        return b.T, a.T, s
    lower = torch.linalg.cholesky(g.double())
    half = lower.T @ weight.double()
    values, u = torch.linalg.eigh(half @ x.double() @ half.T)
    u, s = u.flip(1), values.flip(0).clamp_min(values[-1] * 1e-24).sqrt()
    root = s.sqrt()
    a = (u.T @ half) / root[:, None]
    return a, torch.linalg.solve_triangular(lower.T, u * root, upper=True), s


def _flat(moment: Tensor, flatten: float) -> Tensor:
    """Scale a second moment to a mean of 1 and bring it towards the identity."""
    scaled = moment.double() / moment.diagonal().mean().clamp_min(1e-30).double()
    scaled.diagonal().add_(flatten)
    return scaled


def _weight(module: nn.Module) -> Tensor:
    """Take a linear's matrix, ``[out, in]`` in float32, whatever its class."""
    weight = cast(Tensor, module.weight).detach().float()
    return weight.T if isinstance(module, Conv1D) else weight


def _shape(module: nn.Module) -> tuple[int, int]:
    out, into = cast(Tensor, module.weight).shape[:: -1 if isinstance(module, Conv1D) else 1]
    return out, into
