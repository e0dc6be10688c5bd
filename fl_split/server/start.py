"""The shared weights that every node starts from, made by the server without the model's weights."""

from torch import Tensor

from fl_split.config import RunConfig
from fl_split.errors import ConfigError
from fl_split.model import adapters
from fl_split.model.checkpoint import read_config
from fl_split.model.ends import sketch_ends


def starting_adapter(config: RunConfig) -> dict[str, Tensor]:
    """The shared weights that every node starts from, by name in order, from the model's configuration alone.

    Raises:
        ConfigError: Some of them depend on the model's own weights.
    """
    base = read_config(config.model.name, config.model.revision)
    ends = sketch_ends(base, config.split.bottom_layers, config.split.top_layers, config.data.label_names)
    model = adapters.attach(ends, config.lora, train_bottom=config.surrogate.trains_bottom, seed=config.train.seed)
    every = adapters.adapter_shapes(model)
    shapes = {name: shape for name, shape in every.items() if adapters.is_shared(model, name, config.aggregation)}
    fresh = adapters.fresh_state(shapes, config.train.seed)
    if unknown := [name for name in shapes if name not in fresh]:
        raise ConfigError(
            f"aggregation.strategy={config.aggregation.strategy!r} and dp.mode={config.dp.mode!r} need to know where "
            f"nodes start, but {unknown[0]} depends on weights that the server does not hold: use 'fedavg' without dp"
        )
    return fresh
